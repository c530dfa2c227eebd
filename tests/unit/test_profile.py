"""`fastpref profile` against one plain backward per pair in float64, and its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref import cli
from fastpref.config import Config
from fastpref.data.dataset import Dataset, load_dataset
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.recorder import read_records
from fastpref.dynamics.sampling import FoldSums, estimated, quantities
from fastpref.loading import load_model
from fastpref.losses import get_loss
from fastpref.model import PairModel
from fastpref.profile import Profile, profile
from fastpref.refcache import with_reference
from fastpref.report.profile_tables import with_error


@pytest.fixture(scope="module")
def setup(tiny_model_dir: Path, personas: Path, tmp_path_factory: Any) -> Any:
    """A model in float64 that has left its reference; the reference log-probs are in the pairs."""
    config = Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(personas),),
        dtype="float64",
        max_length=128,
        beta=0.3,
        eval_fraction=0.0,
        ref_cache_dir=str(tmp_path_factory.mktemp("reference")),
        max_tokens_per_microbatch=400,
    )
    model = load_model(config)
    dataset = load_dataset(config, model.tokenizer)
    train = with_reference(model, dataset.train, cache_dir=config.ref_cache_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    return config, model, dataclasses.replace(dataset, train=train)


def logp(model: PairModel, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """log pi(completion | prompt), the plain way."""
    ids = torch.tensor(np.concatenate([prompt, completion]))[None]
    with model.plain_attention():
        logits = model.module(ids).logits[0].double()
    own = torch.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return own[len(prompt) - 1 :].sum()


@dataclasses.dataclass
class Naive:
    """Whole gradients of one pair."""

    chosen: torch.Tensor  # of logp_chosen, all weights
    rejected: torch.Tensor
    margin: float
    sizes: dict[str, slice]  # parameter -> its part

    @property
    def m(self) -> torch.Tensor:
        return self.chosen - self.rejected


def naive(model: PairModel, pair: TokenPair) -> Naive:
    names = [n for n, p in model.module.named_parameters() if p.requires_grad]
    sides, values = [], []
    for completion in (pair.chosen, pair.rejected):
        value = logp(model, pair.prompt, completion)
        found = torch.autograd.grad(value, model.trained)
        sides.append(torch.cat([g.flatten() for g in found]))
        values.append(float(value.detach()))
    sizes, start = {}, 0
    for name, parameter in zip(names, model.trained, strict=True):
        sizes[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    assert pair.ref_chosen is not None and pair.ref_rejected is not None
    margin = (values[0] - pair.ref_chosen) - (values[1] - pair.ref_rejected)
    return Naive(*sides, margin, sizes)


def gradients_of(setup: Any) -> dict[int, Naive]:
    _, model, dataset = setup
    return {pair.pair_id: naive(model, pair) for pair in dataset.train}


@pytest.fixture(scope="module")
def truth(setup: Any) -> dict[int, Naive]:
    return gradients_of(setup)


@pytest.fixture(scope="module")
def exact(setup: Any) -> Profile:
    config, model, dataset = setup
    config = dataclasses.replace(config, sketch_dim=24)
    return profile(config, model, dataset, track="exact", sample=0, displacement=True)


def by_behavior(found: Profile, dataset: Dataset) -> dict[str, list[int]]:
    ids = zip(found.pairs["pair_id"].tolist(), found.pairs["behavior"].tolist(), strict=True)
    own: dict[str, list[int]] = {name: [] for name in found.behaviors}
    for pair_id, behavior in ids:
        own[dataset.behaviors[behavior]].append(pair_id)
    return own


@dataclasses.dataclass
class Means:
    """M_k, G_l and mean grad logp_chosen of every behavior, whole vectors."""

    m: list[torch.Tensor]
    g: list[torch.Tensor]
    chosen: list[torch.Tensor]

    def gamma(self) -> np.ndarray:
        return np.array([[float(m @ g) for g in self.g] for m in self.m])


def means(
    found: Profile, setup: Any, truth: dict[int, Naive], at_start: bool = False
) -> tuple[Means, dict[str, list[int]]]:
    config, _, dataset = setup
    own = by_behavior(found, dataset)
    total = len(dataset.train)

    def weight(one: Naive) -> float:
        margin = 0.0 if at_start else one.margin
        return config.beta / (1 + np.exp(config.beta * margin))

    def mean(ids: list[int], of: Any) -> torch.Tensor:
        return torch.stack([of(truth[i]) for i in ids]).mean(0)

    size = {n: sum(dataset.behaviors[p.behavior] == n for p in dataset.train) for n in own}
    return Means(
        [mean(ids, lambda t: t.m) for ids in own.values()],
        [size[n] / total * mean(ids, lambda t: weight(t) * t.m) for n, ids in own.items()],
        [mean(ids, lambda t: t.chosen) for ids in own.values()],
    ), own


def test_norms_of_every_pair(exact: Profile, truth: dict[int, Naive]) -> None:
    columns = exact.pairs
    assert sorted(columns["pair_id"].tolist()) == sorted(truth)
    for i, pair_id in enumerate(columns["pair_id"].tolist()):
        own = truth[pair_id]
        expected = {
            "gnorm_m": own.m.norm(),
            "gnorm_chosen": own.chosen.norm(),
            "gnorm_rejected": own.rejected.norm(),
            "dot_chosen_rejected": own.chosen @ own.rejected,
            "margin": torch.tensor(own.margin),
        }
        # Columns are float32, and so are the norms within transformers' Llama. A margin and a dot
        # are differences.
        sides = float(own.chosen.norm() * own.rejected.norm())
        for name, value in expected.items():
            scale = {"margin": 1e-5, "dot_chosen_rejected": 1e-6 * sides}.get(name, 0.0)
            assert columns[name][i] == pytest.approx(float(value), rel=3e-6, abs=scale), name


def test_norms_by_layer_group(exact: Profile, truth: dict[int, Naive], setup: Any) -> None:
    own = by_behavior(exact, setup[2])
    group = exact.groups.index("block.0.mlp")
    norms = exact.groups.index("norms")
    for k, ids in enumerate(own.values()):
        for at, holds in ((group, "layers.0.mlp"), (norms, "norm")):
            square = [
                sum(
                    float(truth[i].m[s].square().sum())
                    for n, s in truth[i].sizes.items()
                    if holds in n
                )
                for i in ids
            ]
            assert exact.group_norm[k, at] == pytest.approx(np.sqrt(np.mean(square)), rel=1e-7)
            assert exact.group_norm_error[k, at] == 0
    whole = [
        np.sqrt(np.mean([float(truth[i].m.square().sum()) for i in ids])) for ids in own.values()
    ]
    np.testing.assert_allclose(np.sqrt((exact.group_norm**2).sum(axis=1)), whole, rtol=1e-7)


def within(estimate: Any, expected: np.ndarray, errors: float = 4.5) -> None:
    """Every value within its error bars, and the bars no wider than the values need."""
    value, error = (np.asarray(x, float) for x in estimate)
    off = np.abs(value - expected)
    assert (off <= errors * error + 1e-12).all(), (value, expected, error)
    assert off.max() > 0.02 * error.min()  # an error bar that says nothing would


def test_quantities_of_all_pairs(exact: Profile, setup: Any, truth: dict[int, Naive]) -> None:
    of, _ = means(exact, setup, truth)
    gamma = of.gamma()
    step = torch.stack(of.g).sum(0)
    square = float(step @ step)
    share = np.array([float(g @ step) for g in of.g]) / square
    within(exact.estimates["dot"], gamma)
    within(exact.estimates["rate"], gamma.sum(axis=1))
    within(exact.estimates["share"], share)
    within(exact.estimates["chosen_rate"], np.array([float(c @ step) for c in of.chosen]))
    assert exact.estimates["share"].value.sum() == pytest.approx(1.0, abs=1e-12)
    lengths = np.outer([float(m.norm()) for m in of.m], [float(g.norm()) for g in of.g])
    within(exact.estimates["cos"], gamma / lengths)
    # The bars are of use: most of them are smaller than what they belong to.
    assert np.median(exact.estimates["dot"].error / np.abs(gamma)) < 0.5
    ks = {name: k for k, name in enumerate(exact.behaviors)}
    for row in exact.gram:
        k, other = ks[row["behavior"]], ks[row["other"]]
        assert row["dot"] == pytest.approx(exact.estimates["dot"].value[k, other], rel=1e-9)


def too_long(grads: torch.Tensor, labels: list[str]) -> float:
    """What the squared mean of pairs drawn label by label, in proportion, is too long by."""
    total = 0.0
    for label in set(labels):
        own = grads[[i for i, one in enumerate(labels) if one == label]]
        spread = float((own - own.mean(0)).square().sum()) / (len(own) - 1)
        total += (len(own) / len(grads)) ** 2 * spread / len(own)
    return total


def test_what_a_behavior_is_like(exact: Profile, setup: Any, truth: dict[int, Naive]) -> None:
    of, own = means(exact, setup, truth)
    label = {pair.pair_id: pair.label for pair in setup[2].train}
    for row, ids, mean in zip(exact.rows, own.values(), of.m, strict=True):
        grads = torch.stack([truth[i].m for i in ids])
        n, squares = len(ids), float(grads.square().sum(1).mean())
        true = float(mean @ mean) - too_long(grads, [label[i] for i in ids])
        assert row["n"] == n and row["gnorm_m_sq"] == pytest.approx(squares, rel=1e-6)
        off = abs(row["coherence"] - true / squares)
        assert off < 4.5 * row["coherence_error"]
        assert row["margin"] == pytest.approx(np.mean([truth[i].margin for i in ids]), rel=1e-4)
    displaced = [
        np.mean([float(truth[i].chosen @ truth[i].m) < 0 for i in ids]) for ids in own.values()
    ]
    assert exact.displaced is not None
    np.testing.assert_allclose(exact.displaced, displaced)


def test_predicted_displacement_happens(
    exact: Profile, setup: Any, truth: dict[int, Naive]
) -> None:
    """A small step on a pair alone lowers its chosen log-prob iff d > n_c^2."""
    _, model, dataset = setup
    pairs = {pair.pair_id: pair for pair in dataset.train}
    before = [p.detach().clone() for p in model.trained]
    columns = exact.pairs
    signs = set()
    for i, pair_id in list(enumerate(columns["pair_id"].tolist()))[::5]:
        predicted = float(columns["gnorm_chosen"][i]) ** 2 - float(
            columns["dot_chosen_rejected"][i]
        )
        # Central differences, of a step that float32 norms within the model do not blur.
        step = 1e-3 / float(truth[pair_id].m.norm())
        ends = []
        for side in (1.0, -1.0):
            with torch.no_grad():
                start = 0
                for parameter in model.trained:
                    own = truth[pair_id].m[start : start + parameter.numel()]
                    parameter += side * step * own.view_as(parameter)
                    start += parameter.numel()
                ends.append(float(logp(model, pairs[pair_id].prompt, pairs[pair_id].chosen)))
                for parameter, value in zip(model.trained, before, strict=True):
                    parameter.copy_(value)
        scale = 1e-3 * float(columns["gnorm_chosen"][i] * columns["gnorm_m"][i])
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(predicted, rel=1e-3, abs=scale)
        signs.add(predicted > 0)
    assert signs


def test_noise_scale(exact: Profile, setup: Any, truth: dict[int, Naive]) -> None:
    config, _, dataset = setup
    weight = {i: config.beta / (1 + np.exp(config.beta * t.margin)) for i, t in truth.items()}
    grads = torch.stack([weight[i] * t.m for i, t in truth.items()])
    mean, squares = grads.mean(0), float(grads.square().sum(1).mean())
    _, own = means(exact, setup, truth)
    total, bias = len(truth), 0.0
    label = {pair.pair_id: pair.label for pair in dataset.train}
    for ids in own.values():
        mine = torch.stack([weight[i] * truth[i].m for i in ids])
        bias += (len(ids) / total) ** 2 * too_long(mine, [label[i] for i in ids])
    true = float(mean @ mean) - bias
    if true > 0.1 * squares:
        off = abs(float(exact.noise.value) - (squares - true) / true)
        assert off < 4.5 * float(exact.noise.error)
    else:  # the sketches cannot tell it: then it must be said to be uncertain or not known
        assert np.isnan(exact.noise.value) or float(exact.noise.error) > 0


@pytest.mark.parametrize("track", ["sketch", "exact"])
def test_at_the_start_margins_are_zero(setup: Any, truth: dict[int, Naive], track: str) -> None:
    config, model, dataset = setup
    bare = [dataclasses.replace(p, ref_chosen=None, ref_rejected=None) for p in dataset.train]
    found = profile(config, model, dataclasses.replace(dataset, train=bare), track=track, sample=0)
    assert found.at_start and np.abs(found.pairs["margin"]).max() < 1e-6
    np.testing.assert_allclose(found.pairs["weight"], config.beta / 2, rtol=1e-6)
    of, _ = means(found, setup, truth, at_start=True)
    within(found.estimates["dot"], of.gamma())
    assert (found.pairs["gnorm_m"] > 0).all()
    assert found.method == {"exact": "gram", "sketch": "sketch"}[track]


def test_head_alone(setup: Any, truth: dict[int, Naive]) -> None:
    config, model, dataset = setup
    found = profile(config, model, dataset, track="head", sample=0)
    assert found.groups == ("head",) and found.estimates["chosen_rate"].value.shape == (
        len(found.behaviors),
    )
    head = "lm_head.weight"
    for i, pair_id in enumerate(found.pairs["pair_id"].tolist()):
        own = truth[pair_id]
        expected = float(own.m[own.sizes[head]].norm())
        assert found.pairs["head_gnorm_m"][i] == pytest.approx(expected, rel=3e-6)


def test_samples_stand_for_all(setup: Any, exact: Profile) -> None:
    """Estimates from a few pairs of each behavior, within their errors of those of all pairs."""
    config, model, dataset = setup
    wide = dataclasses.replace(config, sketch_dim=24)
    few = profile(wide, model, dataset, track="sketch", sample=12)
    assert len(few.pairs["pair_id"]) == 12 * len(few.behaviors)
    assert few.whole.tolist() == exact.whole.tolist()
    for name in ("dot", "rate", "share"):
        own, all_pairs = few.estimates[name], exact.estimates[name]
        off = np.abs(own.value - all_pairs.value)
        assert (off < 4.5 * own.error).all(), name
        assert (own.error > all_pairs.error).mean() > 0.6, name
    assert few.estimates["share"].value.sum() == pytest.approx(1.0, abs=1e-9)


def test_jackknife_of_known_gradients() -> None:
    """Bias and error over many samples of pairs whose gradients are known whole."""
    rng = np.random.default_rng(0)
    k, folds, n, size = 2, 8, 16, 200
    centre = rng.normal(size=(k, 1, 1, 2, 2)) * 0.3
    data = centre + rng.normal(size=(k, size, 1, 2, 2))
    whole = np.array([size, size])
    mean = data.mean(axis=1).reshape(k, -1)
    truth = quantities(mean, -(-mean / 2), None)
    nothing = {name: np.zeros_like(value) for name, value in truth.items()}
    off: dict[str, list[np.ndarray]] = {name: [] for name in ("dot", "rate")}
    error: dict[str, list[np.ndarray]] = {name: [] for name in ("dot", "rate")}
    for _ in range(400):
        picked = np.stack([own[rng.permutation(size)[:n]] for own in data])
        sums = picked.reshape(k, n // folds, folds, 1, 2, 2).sum(axis=1)
        own = FoldSums(np.full((k, folds), n / folds), np.moveaxis(sums, 2, 0))
        lost = FoldSums(own.count, -own.sketch)
        found = estimated(own, lost, None, whole, nothing)
        for name in off:
            off[name].append(found[name].value - truth[name])
            error[name].append(found[name].error)
    for name in off:
        values, errors = np.stack(off[name]), np.stack(error[name])
        spread = values.std(axis=0)
        assert (np.abs(values.mean(axis=0)) < 4 * spread / 20 + 0.02).all(), name
        ratio = np.sqrt((errors**2).mean(axis=0)) / spread
        assert ((0.8 < ratio) & (ratio < 1.6)).all(), (name, ratio)


@pytest.mark.parametrize("loss_type", ["hinge", "simpo", "orpo"])
def test_other_losses(setup: Any, truth: dict[int, Naive], loss_type: str) -> None:
    config, model, dataset = setup
    config = dataclasses.replace(config, loss_type=(loss_type,), beta=0.2)
    found = profile(config, model, dataset, track="exact", sample=0)
    loss = get_loss(config.loss_type)
    assert ("gnorm_chosen" in found.pairs) == (not loss.margin_only)
    pairs = {pair.pair_id: pair for pair in dataset.train}

    def direction(pair_id: int) -> torch.Tensor:
        """- grad loss, by autograd through the loss as its page defines it."""
        own, pair = truth[pair_id], pairs[pair_id]
        c, r = (logp(model, pair.prompt, side) for side in (pair.chosen, pair.rejected))
        c, r = c.detach().requires_grad_(), r.detach().requires_grad_()
        if loss_type == "hinge":
            assert pair.ref_chosen is not None and pair.ref_rejected is not None
            m = (c - pair.ref_chosen) - (r - pair.ref_rejected)
            value = torch.relu(1 - config.beta * m)
        elif loss_type == "simpo":
            gap = config.beta * (c / len(pair.chosen) - r / len(pair.rejected))
            value = -torch.nn.functional.logsigmoid(gap - (config.simpo_gamma or 0.5))
        else:
            per = [x / n for x, n in ((c, len(pair.chosen)), (r, len(pair.rejected)))]
            odds = [x - torch.log1p(-torch.exp(x)) for x in per]
            value = -per[0] - config.beta * torch.nn.functional.logsigmoid(odds[0] - odds[1])
        a, b = torch.autograd.grad(value, (c, r))
        return -(a * own.chosen + b * own.rejected)

    own = by_behavior(found, dataset)
    total = len(dataset.train)
    g = [sum(direction(i) for i in ids) / total for ids in own.values()]
    m = [torch.stack([truth[i].m for i in ids]).mean(0) for ids in own.values()]
    gamma = np.array([[float(a @ b) for b in g] for a in m])
    within(found.estimates["dot"], gamma)


def test_the_model_is_left_as_it_was(setup: Any) -> None:
    config, model, dataset = setup
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = profile(config, model, dataset, track="sketch", sample=4, displacement=True)
    assert torch.equal(torch.get_rng_state(), state)
    again = profile(config, model, dataset, track="sketch", sample=4, displacement=True)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    for name, column in first.pairs.items():
        np.testing.assert_array_equal(column, again.pairs[name])
    for name, estimate in first.estimates.items():
        np.testing.assert_array_equal(estimate.value, again.estimates[name].value)


# The command


def run_command(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main(["profile", *map(str, args)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def options(tmp_path: Path) -> tuple[object, ...]:
    own = ("--sample", 6, "--max_length", 128, "--ref_cache_dir", tmp_path / "refs")
    return (*own, "--token_cache_dir", tmp_path / "tokens", "--disable_tqdm", "--dtype", "float64")


def test_files(
    tiny_model_dir: Path,
    personas: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
) -> None:
    out = tmp_path / "out"
    args = (tiny_model_dir, personas, *options, "--out", out, "--displacement")
    shown = run_command(capsys, *args)
    assert "Who teaches whom" in shown and "as at the start of a run" in shown
    summary = json.loads((out / "profile.json").read_text())
    pairs, behaviors = read_records(out, "pairs"), read_records(out, "behaviors")
    assert pairs.num_rows == 6 * behaviors.num_rows == 6 * len(summary["behaviors"])
    assert read_records(out, "gram").num_rows == behaviors.num_rows**2
    assert set(pairs["norm_method"].to_pylist()) == {"sketch"}
    assert len(pairs["gnorm_groups"][0].as_py()) == len(summary["groups"])
    rates = [own["rate"] for own in summary["behaviors"]]
    assert rates == sorted(rates, reverse=True)
    assert sum(own["share"] for own in summary["behaviors"]) == pytest.approx(1)
    page = (out / "profile.html").read_text()
    assert page.count("data:image/svg+xml") == 2 and "http" not in page.split("base64")[0]
    kept = {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    again = run_command(capsys, *args)
    assert again == shown
    for file, content in kept.items():
        assert file.read_bytes() == content, file
    assert cli.main(["watch", str(out)]) == 0  # its records are a run's
    assert "train_sample after step 0" in capsys.readouterr().out


def test_a_run_brings_its_reference_and_its_loss(
    tiny_model_dir: Path,
    personas: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
) -> None:
    run = tmp_path / "run"
    train = [
        *("--model_name_or_path", tiny_model_dir, "--dataset_name", personas, "--output_dir", run),
        *("--max_steps", 4, "--save_steps", 2, "--learning_rate", "3e-3", "--beta", "0.25"),
        *("--train_batch_size", 8, "--max_length", 128, "--eval_steps", 0, "--dtype", "float64"),
        *("--ref_cache_dir", tmp_path / "refs", "--token_cache_dir", tmp_path / "tokens"),
    ]
    assert cli.main(["train", *map(str, train)]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    margins = []
    for model in (run, run / "checkpoint-4", run / "checkpoint-2"):
        shown = run_command(capsys, model, personas, *options, "--track", "head", "--out", out)
        assert "beta 0.25" in shown and f"reference: {tiny_model_dir}" in shown
        margins.append(np.array(read_records(out, "pairs")["margin"].to_pylist()))
    np.testing.assert_array_equal(margins[0], margins[1])
    assert np.abs(margins[0]).max() > 1e-3 and np.abs(margins[0] - margins[2]).max() > 1e-4

    def complaint(*args: object) -> str:
        assert cli.main(["profile", *map(str, args)]) == 2
        return capsys.readouterr().err

    said = complaint(run / "checkpoint-3", personas, "--out", out)
    assert "no such checkpoint; there are: checkpoint-2, checkpoint-4" in said
    assert "holds a run" in complaint(run, personas, "--out", run)
    assert "expected a number of pairs" in complaint(run, personas, "--sample", -1)
    said = complaint(run, personas, *options, "--out", out, "--loss_type", "aot")
    assert "a profile has no steps" in said
    assert "invalid choice" in complaint(run, personas, "--track", "sketches")
    assert "--sampel: unknown" in complaint(run, personas, "--sampel", 3)
    (run / "checkpoint-2" / "model.safetensors").write_bytes(b"damage")
    assert "checkpoint-2" in complaint(run / "checkpoint-2", personas, "--out", out)


def test_an_adapter_brings_its_base(
    tiny_model_dir: Path,
    personas: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
) -> None:
    pytest.importorskip("peft")
    run = tmp_path / "run"
    train = [
        *("--model_name_or_path", tiny_model_dir, "--dataset_name", personas, "--output_dir", run),
        *("--max_steps", 2, "--save_steps", 2, "--learning_rate", "1e-2", "--trainable", "lora"),
        *("--train_batch_size", 8, "--max_length", 128, "--eval_steps", 0, "--dtype", "float64"),
        *("--ref_cache_dir", tmp_path / "refs", "--token_cache_dir", tmp_path / "tokens"),
    ]
    assert cli.main(["train", *map(str, train)]) == 0
    capsys.readouterr()
    copied = tmp_path / "adapter"
    copied.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copied / name).write_bytes((run / name).read_bytes())
    margins = []
    for model in (run, copied):
        out = tmp_path / f"out-{model.name}"
        shown = run_command(capsys, model, personas, *options, "--out", out)
        assert "without the adapter" in shown
        margins.append(np.array(read_records(out, "pairs")["margin"].to_pylist()))
        groups = json.loads((out / "profile.json").read_text())["groups"]
        assert "embedding" not in groups and "head" not in groups
    np.testing.assert_array_equal(margins[0], margins[1])
    assert np.abs(margins[0]).max() > 1e-3


def test_numbers_with_errors() -> None:
    assert with_error(62.93, 3.24) == "62.9±3.2" and with_error(0.0012, 0.00031) == "0.0012±0.0003"
    assert with_error(1234.5, 99.0) == "1234±99" and with_error(1e-7, 2e-8) == "1.0e-07±2e-08"


def test_what_is_left_to_the_planner_is_as_without_one() -> None:
    from fastpref.commands.profile import configuration
    from fastpref.origin import Origin

    config = configuration(Origin({"model_name_or_path": "m"}), {"max_tokens_per_microbatch": "0"})
    assert config.max_tokens_per_microbatch == 16384
