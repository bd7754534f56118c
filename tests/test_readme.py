"""README.md: every code block runs, its numbers are those of the evidence, and its links work on a package index."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import hypothesis  # noqa: F401  else its plugin imports it at the end of the session, and that warns after Lightning
import pytest
import torch

import check_examples
import steppe
from readme_blocks import README, Block, blocks, programs

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(TEXT)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def diff() -> Block:
    (block,) = [block for block in BLOCKS if block.language == "diff"]
    return block


def test_every_block_is_of_a_kind_that_runs():
    assert {block.language for block in BLOCKS} == {"", "python", "diff"}
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert [block.installation for block in BLOCKS if block.installation] == list(IN_FRAMEWORKS)


def test_programs_run_one_after_the_other(capsys):
    torch.manual_seed(0)
    names = {}
    for program in programs(TEXT):
        exec(program, names)
    printed = capsys.readouterr().out
    assert "SAM around SGD: 10 steps, 10 of them perturbed" in printed
    assert "foret2021sam" in printed
    assert isinstance(names["optimizer"], steppe.compat.SAM)


def test_diff_is_five_lines_against_an_ordinary_loop():
    changed = [line for line in diff().text.splitlines() if line[:1] in ("+", "-")]
    assert len(changed) == 5
    torch.manual_seed(0)
    names = {}
    exec(diff().side("-"), names)
    assert type(names["optimizer"]) is torch.optim.SGD
    torch.manual_seed(0)
    with_sam = {}
    exec(diff().side("+"), with_sam)
    assert with_sam["optimizer"].report().perturbed_steps == len(with_sam["batches"])
    before, after = (torch.nn.utils.parameters_to_vector(n["model"].parameters()) for n in (names, with_sam))
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def test_a_diff_has_two_sides():
    block = Block("diff", " a = 1\n\n-b = 2\n+b = 3\n")
    assert (block.side("-"), block.side("+")) == ("a = 1\n\nb = 2\n", "a = 1\n\nb = 3\n")


# --- in frameworks: what the reader has, and how the reader trains; the result is SAM's report ---


def in_lightning(run: dict, folder: Path) -> steppe.Report:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = run()["trainer"]
    # without TensorBoard and the progress bar, whose threads may outlive the test
    (callback,) = trainer.callbacks = [c for c in trainer.callbacks if hasattr(c, "reports")]
    trainer.loggers = []
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=4))
    (report,) = callback.reports()
    return report


def in_transformers(run: dict, folder: Path) -> steppe.Report:
    from tiny_transformer import arguments, gpt, tokens

    trainer = run(model=gpt(), args=arguments(folder, max_steps=2), train_dataset=tokens(4))["trainer"]
    trainer.train()
    return trainer.sam_report()


IN_FRAMEWORKS = {
    "'.[lightning]'": in_lightning,
    "'.[transformers]'": in_transformers,
}


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*",
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",
    "ignore:.*pin_memory.*:UserWarning",
)
@pytest.mark.parametrize("installation", IN_FRAMEWORKS)
def test_framework_lines_train_with_sam(installation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCKS if block.installation == installation]
    torch.manual_seed(0)

    def run(**reader):
        exec(block.text, names := {"torch": torch, "steppe": steppe, **reader})
        return names

    report = IN_FRAMEWORKS[installation](run, tmp_path)
    assert (report.steps, report.perturbed_steps) == (2, 2)
    assert report.rho == pytest.approx(0.05)
    assert report.length_in_rho == pytest.approx(1, rel=1e-4)


# --- commands ---


def commands() -> list[str]:
    """Return the commands of the shell, without comments."""
    return [
        command.split("  #")[0].strip()
        for block in BLOCKS
        if not block.language
        for command in re.sub(r"^(make \w+)  .*$", r"\1", block.text, flags=re.MULTILINE).splitlines()
    ]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    program, *words = command.split()
    if program == "pip":
        assert words[0] == "install"
        name, extras = re.fullmatch(r"'?(\.|[\w-]+)(?:\[(.*)\])?'?", words[1]).groups()
        assert name == "."
        assert set((extras or "experiments").split(",")) <= EXTRAS.keys()
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        from steppe.experiments.commands import parse

        assert program == "steppe"
        if words[1].startswith("-"):
            words.insert(1, "demo")  # the default
        assert callable(parse(words).run)


def test_installations_name_extras_that_exist():
    for extra in re.findall(r"\.\[([\w,-]+)\]", TEXT):
        assert extra in EXTRAS


# --- numbers and claims ---


def differences(setting: str) -> list[tuple[float, float, float]]:
    """Return SAM's leads in accuracy at equal compute and beside the controls, from the page made of the results."""
    lines = (ROOT / "docs" / "evidence" / "noisy-labels.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {setting} | SAM (rho 0.1) | accuracy | "))
    return [tuple(map(float, found)) for found in re.findall(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", row)]


def test_numbers_of_the_picture_are_those_of_the_results():
    text = " ".join(TEXT.split())
    leads = differences("40 % wrong")
    assert len(leads) == 5
    assert all(low > 0 for _, low, _ in leads), "beyond chance beside every control"
    lead, *controls = leads
    value, low, high = lead
    assert f"SAM is {value:.1f} points more accurate than SGD at equal compute [{low:.1f}, {high:.1f}]" in text
    value, low, high = min(controls)
    assert controls.index(min(controls)) == 3, "averaged weights at their best measurement"
    assert f"and {value:.1f} points [{low:.1f}, {high:.1f}] more than the strongest alternative" in text
    page = (ROOT / "docs" / "evidence" / "corruptions.md").read_text(encoding="utf-8")
    value, low, high = re.search(
        r"^\|  \| accuracy \| \W*\+([\d.]+) \[\+([\d.]+), \+([\d.]+)\]", page, flags=re.MULTILINE
    ).groups()
    assert f"SAM is {float(value):.1f} points better [{float(low):.1f}, {float(high):.1f}], but" in text
    for line in ("2 cores of an AMD EPYC, torch 2.13.0", "2026-11-29"):
        assert line in text
        assert line in (ROOT / "docs" / "evidence" / "noisy-labels.md").read_text(encoding="utf-8")


# --- on a package index ---


@pytest.fixture(scope="module")
def description():
    spec = importlib.util.spec_from_file_location("steppe_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.description


def links(text: str) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(is_image=bool(image), target=target)
        for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    ]


def test_links_lead_to_the_released_files_on_a_package_index(description):
    found = links(description(TEXT, "9.8.7", "https://example.org/steppe/"))
    assert len(found) == len(links(TEXT)) > 20
    relative = [link.target for link in links(TEXT) if not link.target.startswith("https:")]
    for link in found:
        assert link.target.startswith("https://")
        if link.target.startswith("https://example.org/"):
            kind, path = re.fullmatch(r"https://example.org/steppe/(blob|raw)/v9.8.7/(.*)", link.target).groups()
            assert kind == ("raw" if link.is_image else "blob")
            assert (ROOT / path.partition("#")[0]).is_file()
            relative.remove(path)
    assert not relative


def test_without_an_address_no_link_is_broken_on_a_package_index(description):
    text = description(TEXT, "9.8.7", None)
    assert all(link.target.startswith("https://") and not link.is_image for link in links(text))
    assert "Which method should I take?" in text


def test_commands_install_the_released_package_on_a_package_index(description):
    text = description(TEXT, "9.8.7", None)
    assert "\npip install steppe  " in text
    assert "pip install 'steppe[tune]'" in text
    assert "# pip install 'steppe[lightning]'\n" in text
    assert "pip install ." not in text
    assert "pip install '." not in text


def test_readme_links_within_itself_nowhere():
    assert not [link.target for link in links(TEXT) if link.target.startswith("#")], "an index may not number headings"


# --- `make check` ---


def test_type_checkers_see_the_programs():
    code = check_examples.code(README)
    compile(code, "README.md", "exec")
    assert "steppe.variants.gsam" in code
    assert "import lightning" not in code
