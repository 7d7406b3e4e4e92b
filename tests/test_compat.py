"""The old Trainer's semantics: counted by hand, against its published table, against a replay."""

import csv
import pathlib

import numpy as np
import pytest
import small_run
from data import small_splits
from test_step import QUIET, _model

from flax_asr import compat, config, corpora, experiment, origins, step
from flax_asr.data import buckets, loader
from flax_asr.record import window

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parent.parent
PUBLISHED = ROOT / "tests" / "fixtures" / "seed_results.tsv"
OLD = {"train": {"compat": "hf-4.17"}}


def _recipe(*more: str) -> config.Config:
    return config.load(ROOT / "configs" / "xls_r_300m_zh_hk.yaml", more)


def _samples(clips: int) -> np.ndarray:
    return np.full(clips, 16_000, np.int32)


def _plan(clips: int, *more: str) -> tuple[int, int]:
    cfg = _recipe(*more)
    plan = experiment.train_plan(cfg, _samples(clips), (16_080,), 8)
    return plan.updates_per_epoch, experiment.total_updates(cfg.train, plan.updates_per_epoch)


def test_the_zh_hk_recipe_makes_the_published_number_of_updates():
    assert _plan(11_936) == (373, 18_650)
    assert _plan(11_936, "--train.compat", "null") == (373, 18_650)
    assert _plan(11_940) == (373, 18_650)
    assert _plan(11_940, "--train.compat", "null") == (374, 18_700)


@pytest.mark.parametrize("clips", [11_940, 11_944])
def test_the_epochs_of_the_log_are_those_of_the_published_card(clips):
    plan = experiment.train_plan(_recipe(), _samples(clips), (16_080,), 8)
    with PUBLISHED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 37
    for row in rows:
        assert round(plan.epoch(int(row["step"])), 2) == float(row["epoch"])


def _replayed(epochs: list[list], groups_per_update: int) -> list[tuple[list, float]]:
    """What the old loop adds up before each of its updates, and the epoch that it logs then."""
    updates, sums = [], []
    for epoch, micro_batches in enumerate(epochs):
        for i, micro_batch in enumerate(micro_batches):
            sums.append(micro_batch)
            last = i + 1 == len(micro_batches) <= groups_per_update
            if (i + 1) % groups_per_update == 0 or last:
                updates.append((sums, epoch + (i + 1) / len(micro_batches)))
                sums = []
    return updates


@pytest.mark.parametrize("clips", [1, 7, 8, 9, 31, 32, 33, 39, 41, 64, 71])
def test_left_over_micro_batches_join_the_next_update(clips):
    plan = buckets.TrainPlan(_samples(clips), (16_080,), 2, 4, seed=3, leaks=True)
    sound = buckets.TrainPlan(_samples(clips), (16_080,), 2, 4, seed=3)
    epochs = [
        [
            g
            for u in range(sound.updates_per_epoch)
            for g in sound.update(e * sound.updates_per_epoch + u)
        ]
        for e in range(4)
    ]
    expected = _replayed(epochs, 4)
    assert len(expected) == 4 * plan.updates_per_epoch
    for number, (groups, epoch) in enumerate(expected):
        assert plan.epoch(number + 1) == pytest.approx(epoch, rel=1e-12)
        found = plan.update(number)
        assert [g.rows.tolist() for g in found] == [g.rows.tolist() for g in groups]


def test_an_update_is_the_sum_of_the_means_of_its_micro_batches():
    """Over the micro-batches an update should have, however many leaked into it."""
    model_config, _, params = _model(**QUIET)
    objective = small_run.objective(model_config)
    groups = [small_run.batch(4, seed, model_config.vocab_size) for seed in (1, 2)]
    part = small_run.batch(4, 3, model_config.vocab_size, fillers=3)

    def update(*batches, clips_an_update=None):
        trainer = small_run.Trainer(objective, params, clips_an_update=clips_an_update)
        return trainer.update(*batches)

    alone = [float(update(batch).loss) for batch in (*groups, part)]
    plan = buckets.TrainPlan(_samples(9), (16_080,), 4, 2, seed=0, leaks=True)
    weight = plan.row_weight(buckets.Group(0, np.array([5, -1, -1, -1], np.int32)))
    part = part._replace(weights=part.weights * np.float32(weight))
    together = update(*groups, part, clips_an_update=8)
    assert together.loss == pytest.approx(sum(alone) / 2, rel=1e-5)
    # The gradient is divided as the loss is: the same micro-batch twice where one makes an update.
    once, twice = update(groups[0]), update(groups[0], groups[0], clips_an_update=4)
    assert twice.grad_norm == pytest.approx(2 * once.grad_norm, rel=1e-5)


def test_clips_weigh_the_same_without_the_switch():
    plan = buckets.TrainPlan(_samples(9), (16_080,), 4, 2, seed=0)
    assert plan.row_weight(buckets.Group(0, np.array([5, -1, -1, -1], np.int32))) == 1


def test_the_loader_gives_the_weight_to_the_clips_of_a_part_group(tmp_path):
    split = small_splits.write_split(tmp_path, ["a", "b", "c", "d", "e"], samples=[4000] * 5)
    corpus = _corpus(config.build(OLD | {"data": {"language": "eu"}}), train=split)
    plan = buckets.TrainPlan(corpus.train.samples, (4240,), 4, 1, seed=0, leaks=True)
    with loader.updates(corpus.train, plan) as batches:
        weights = [next(batches)[1][0][0].weights.tolist() for _ in range(2)]
    assert sorted(map(sorted, weights)) == [[0, 0, 0, 4], [1, 1, 1, 1]]


def _update(loss: float, finite: bool) -> step.Metrics:
    nothing = dict.fromkeys(step.Metrics._fields, np.float32(0))
    return step.Metrics(**nothing | {"loss": np.float32(loss), "finite": np.bool_(finite)})


def _logged(hides: bool, *updates: step.Metrics) -> float:
    figures = window.Window({}, hides)
    groups = [buckets.Group(0, np.array([0], np.int32))]
    for update in updates:
        figures.add(1, update, groups, lambda epoch: _samples(1), (16_080,))
    return figures.close(0.0)["loss"]


def test_the_old_log_hides_bad_losses_and_counts_skipped_updates():
    good, overflow = _update(4.0, True), _update(2.0, False)
    assert _logged(True, good, overflow) == 3.0
    assert _logged(False, good, overflow) == 4.0
    # Trainer: tr_loss += tr_loss / (1 + steps since the last line); at the end divided by all.
    assert _logged(True, good, good, _update(float("nan"), False)) == round((8 + 8 / 3) / 3, 4)
    assert _logged(True, _update(float("inf"), False), good) == 2.0
    assert _logged(False, good, _update(float("nan"), False)) == 4.0


def _corpus(cfg, train, dev=None) -> corpora.Corpus:
    splits = {"train": train} | ({"dev": dev} if dev is not None else {})
    names = [name for name in splits if name != "train"]
    cfg = config.build(
        config.as_dict(cfg),
        [f"--data.eval_splits=[{','.join(names)}]", "--data.test_splits=[]"],
    )
    start = origins.read(config.ModelConfig(config={"vocab_size": 8}))
    return corpora.gather(cfg, start, splits)


def test_vocabulary_and_targets_are_those_of_the_old_example(tmp_path):
    train = small_splits.write_split(tmp_path / "a", ["It's 42 (a-b), 你", "b"], samples=[9000] * 2)
    dev = small_splits.write_split(tmp_path / "b", ["Zé!"], samples=[9000], split="dev")
    corpus = _corpus(config.build(OLD | {"data": {"language": "zh-HK"}}), train, dev)
    written = corpus.vocabulary
    # characters + 4, sorted, "|" where the space was; those of the evaluation text too.
    assert written.tokens == ("|", *"abistzé你", "[UNK]", "[PAD]", "<s>", "</s>")
    assert written.tokens[written.blank] == "[PAD]"
    spelt = ["".join(written.tokens[i] for i in corpus.train.labels(row)) for row in range(2)]
    assert spelt == ["its||ab|你|", "b|"]
    assert corpus.eval.references == ["zé "]
    sound = _corpus(config.build({"data": {"language": "zh-HK"}}), train, dev).vocabulary
    assert sound.tokens[0] == "[PAD]"
    assert "é" not in sound.tokens


def test_a_rule_of_ones_own_keeps_the_delimiter_at_the_end():
    cfg = config.build(OLD | {"data": {"language": "eu"}, "text": {"normalization": ["lower"]}})
    assert compat.normalizer(cfg)("A") == "a "
    again = config.build(
        config.as_dict(cfg) | {"text": {"normalization": compat.normalizer(cfg).spec}}
    )
    assert compat.normalizer(again) == compat.normalizer(cfg)


@pytest.mark.parametrize("train", [OLD, {}], ids=["hf-4.17", "none"])
def test_an_empty_list_of_steps_is_a_rule_and_not_the_default(train):
    cfg = config.build(train | {"data": {"language": "zh-HK"}, "text": {"normalization": []}})
    assert compat.normalizer(cfg)("你好， A") == "你好， A" + (" " if train else "")


def test_bounds_are_strict(tmp_path):
    lengths = [16_000, 16_001, 31_999, 32_000]
    train = small_splits.write_split(tmp_path, list("abcd"), samples=lengths)
    data = {"data": {"language": "eu", "min_seconds": 1.0, "max_seconds": 2.0}}
    old = _corpus(config.build(OLD | data), train).train
    assert old.samples.tolist() == lengths[1:3]
    assert [(clip.id, clip.reason) for clip in old.left_out] == [
        ("train-0.mp3", "too_short"),
        ("train-3.mp3", "too_long"),
    ]
    assert _corpus(config.build(data), train).train.samples.tolist() == lengths
