"""The model card: the published table to the letter, metadata that parses back, no injection."""

import csv
import json
import pathlib

import pytest
import small_saved
from huggingface_hub import ModelCard

from flax_asr import card, config
from flax_asr.record import curves

# The table of the model card of w11wo/wav2vec2-xls-r-300m-zh-HK, as published.
PUBLISHED = pathlib.Path(__file__).parent / "fixtures" / "seed_results.tsv"


def _published() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _printed_figure(written: str) -> float:
    """A figure that is printed so: "7.6860" had more than four decimals, "5.807" had three."""
    value = float(written)
    return value if str(value) == written else value + 1e-9


def _history() -> list[dict]:
    events = []
    for row in _published():
        place = {"step": int(row["step"]), "epoch": float(row["epoch"])}
        # In between are lines of the log that the table does not show.
        events.append({**place, "step": place["step"] - 100, "loss": 3.0})
        events.append({**place, "loss": _printed_figure(row["train_loss"]), "learning_rate": 1e-5})
        scores = {
            "eval_loss": _printed_figure(row["eval_loss"]),
            "eval_wer": _printed_figure(row["wer"]),
            "eval_cer": _printed_figure(row["cer"]),
        }
        events.append({**place, **scores, "eval_clips": 5604})
    return events


def _config(language="zh-HK", **data) -> config.Config:
    return config.build(
        {
            "data": {"source": "/home/someone/cv", "language": language, **data},
            "optim": {"learning_rate": 7.5e-5, "warmup_steps": 2000},
            "train": {"num_train_epochs": 50, "global_batch_size": 32, "mixed_precision": "fp16"},
        }
    )


def _render(run=None, history=None, name="xls-r-300m-zh-hk", facts=None, **metrics) -> str:
    metrics = metrics or {"eval_loss": 1.0450, "eval_wer": 1.8991, "eval_cer": 0.4717}
    saved = small_saved.saved(run=run or _config(), facts=facts, metrics=metrics)
    tested = {"step": 40, "best_step": 30, "test_loss": 1.1, "test_wer": 1.0, "test_cer": 0.1935}
    return card.render(name, saved, history or [*_history(), tested], has_curves=True)


def test_the_published_table_comes_out_to_the_letter():
    published = PUBLISHED.with_name("seed_table.md").read_text(encoding="utf-8")
    assert card.table(_history()) + "\n" == published


def test_an_evaluation_before_the_first_log_line_has_no_training_loss():
    table = card.table([{"step": 5, "epoch": 0.1, "eval_loss": 2.5, "eval_cer": 1.0}])
    assert table.splitlines()[-1].split("|")[1:4] == [" No log        ", " 0.1   ", " 5    "]
    assert "Wer" not in table


def test_a_run_that_was_not_evaluated_says_so():
    assert "not evaluated" in card.table([{"step": 5, "epoch": 0.1, "loss": 2.5}])


def test_the_metadata_parses_back_with_both_scores_of_both_splits():
    data = ModelCard(_render()).data
    assert data.language == ["zh-HK"]
    assert data.license == "apache-2.0"
    assert data.base_model == "facebook/wav2vec2-xls-r-300m"
    assert data.model_name == "xls-r-300m-zh-hk"
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("test", "cer"): 0.1935,
        ("test", "wer"): 1.0,
        ("dev", "cer"): 0.4717,
        ("dev", "wer"): 1.8991,
    }
    for result in data.eval_results:
        assert result.task_type == "automatic-speech-recognition"
        assert result.dataset_args == {"sha256": "ab" * 32, "clips": 7}
        assert result.dataset_name == "cv-corpus-9 zh-HK"
        assert "real frames only" in result.metric_args["rule"]


def test_the_hyperparameters_are_in_the_published_words():
    text = _render()
    published = """- learning_rate: 7.5e-05
- train_batch_size: 8
- eval_batch_size: 8
- seed: 42
- gradient_accumulation_steps: 4
- total_train_batch_size: 32
- optimizer: Adam with betas=(0.9,0.999) and epsilon=1e-08
- lr_scheduler_type: linear
- lr_scheduler_warmup_steps: 2000
- num_epochs: 50.0
"""
    assert published in text


def test_on_several_devices_the_batches_are_counted_as_the_published_cards_do():
    """Four devices of two clips: a group of eight rows."""
    run = config.build(
        {
            "data": {"language": "eu"},
            "train": {
                "global_batch_size": 16,
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 3,
            },
        }
    )
    assert "- num_devices: 4\n- gradient_accumulation_steps: 2\n" in _render(run)
    assert "- total_train_batch_size: 16\n- total_eval_batch_size: 12\n" in _render(run)


def test_the_sections_are_those_of_the_published_card():
    titles = [line for line in _render().splitlines() if line.startswith("#")]
    assert titles == [
        r"# xls-r-300m-zh-hk",
        "## Model description",
        "## Intended uses & limitations",
        "## Training and evaluation data",
        "## Training procedure",
        "### Training hyperparameters",
        "### Training results",
        "### Framework versions",
    ]
    assert "![Losses and error rates over the steps](curves.png)" in _render()


def test_it_names_versions_release_hash_clips_rule_and_origin():
    text = _render()
    for expected in (
        "- JAX ",
        "- Flax ",
        "- Optax ",
        "- Transformers ",
        "- Datasets ",
        "cv-corpus-9",
        "| 7 | 1.00 | `abababababababab` |",
        "real frames only",
        "spaces not counted",
        "normalisation: lower, spaces",
        "at c0ffee",
        "fresh, 11 symbols",
        "after 30 updates",
    ):
        assert expected in text, expected


def test_cer_comes_first_where_words_are_not_separated_and_says_why():
    text = _render()
    assert text.index("- Cer: 0.4717") < text.index("- Wer: 1.8991")
    assert "written without spaces" in text
    spaced = _render(run=_config("eu"))
    assert spaced.index("- Wer: ") < spaced.index("- Cer: ")
    assert "written without spaces" not in spaced
    assert "spaces counted" in spaced


def test_a_test_split_that_chose_the_checkpoint_is_named():
    both = _render(run=_config(eval_splits=["test"], test_splits=["test"]))
    assert "The test score is too good" in both
    assert "The test score is too good" not in _render()


def test_test_scores_of_another_checkpoint_are_not_taken():
    old = {"step": 20, "best_step": 20, "test_loss": 9.0, "test_wer": 9.0, "test_cer": 0.9}
    results = ModelCard(_render(history=[*_history(), old])).data.eval_results
    assert {result.dataset_split for result in results} == {"dev"}


@pytest.mark.parametrize("name", ["release", "head"])
def test_text_from_data_cannot_become_markup(name):
    nasty = "<script>x</script> [click](http://evil) | `code`\n# Title\n---\nlicense: mine"
    split = {"release": nasty, "hash": "ab" * 32, "clips": 7, "seconds": 1.0}
    splits = dict.fromkeys(("train", "eval", "test"), split)
    text = _render(facts={"splits": splits} if name == "release" else {"head": nasty})
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert "](http://evil)" not in body
    assert "\n# Title" not in body
    assert ModelCard(text).data.license == "apache-2.0"
    for row in body.splitlines():
        if row.startswith("| train"):
            assert row.replace("\\|", "").count("|") == 7


def test_paths_of_the_machine_are_nobodys_business():
    text = _render(facts={"started_from": "/home/someone/secret/runs/first", "revision": None})
    assert "/home" not in text
    assert "local model first" in text
    assert ModelCard(text).data.base_model is None


def test_scores_that_are_not_numbers_do_not_spoil_the_metadata():
    text = _render(eval_loss=float("nan"), eval_wer=float("inf"), eval_cer=0.5)
    results = ModelCard(text).data.eval_results
    assert {(r.dataset_split, r.metric_type) for r in results} >= {("dev", "cer")}
    assert ("dev", "wer") not in {(r.dataset_split, r.metric_type) for r in results}


def test_scores_whose_loss_was_no_number_are_shown_and_the_loss_is_said_not_to_be():
    """As the log has them: without the figure."""
    place = {"step": 30, "epoch": 2.5}
    history = [
        {"step": 20, "epoch": 1.5, "loss": 3.25, "learning_rate": 1e-5},
        {**place, "learning_rate": 1e-5, "skipped_steps": 10},
        {**place, "eval_wer": 1.5, "eval_cer": 0.75, "eval_clips": 7},
        {**place, "best_step": 30, "test_wer": 1.25, "test_cer": 0.625, "test_clips": 7},
    ]
    scored = {"eval_loss": float("nan"), "eval_wer": 1.5, "eval_cer": 0.75, "eval_clips": 7}
    text = _render(history=history, **scored)
    for which, cer, wer in (("evaluation", 0.75, 1.5), ("test", 0.625, 1.25)):
        listed = f"- Cer: {cer:.4f}\n- Loss: not finite\n- Wer: {wer:.4f}\n"
        assert f"results on the {which} set:\n{listed}" in text
    cells = [cell.strip() for cell in card.table(history).splitlines()[-1].split("|")[1:-1]]
    assert cells == ["not finite", "2.5", "30", "not finite", "1.5", "0.75"]
    assert "| Validation Loss | Wer " in text
    found = {(r.dataset_split, r.metric_type) for r in ModelCard(text).data.eval_results}
    assert found == {(split, metric) for split in ("dev", "test") for metric in ("cer", "wer")}


def test_a_run_without_any_score_has_a_card():
    saved = small_saved.saved(run=_config(eval_splits=[], test_splits=[]))
    text = card.render("bare", saved, [], has_curves=False)
    assert ModelCard(text).data.language == ["zh-HK"]
    assert "curves.png" not in text


def test_write_takes_the_log_and_the_picture(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in _history()), encoding="utf-8"
    )
    assert curves.draw(tmp_path) == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = card.write(tmp_path, small_saved.saved(run=_config()))
    text = written.read_text(encoding="utf-8")
    assert "| 2.1974        | 49.6  | 18500 |" in text
    assert "](curves.png)" in text
    assert ModelCard.load(written).data.pipeline_tag == "automatic-speech-recognition"


def test_a_log_without_figures_has_no_picture(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "eval_cer": NaN}\n', encoding="utf-8")
    assert curves.draw(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()


def test_knobs_that_are_turned_are_named_and_others_are_not():
    turned = {
        "optim": {
            "head_learning_rate": 1e-3,
            "lr_scheduler_type": "tri_stage",
            "warmup_fraction": 0.1,
            "hold_fraction": 0.4,
            "ema_decay": 0.999,
        }
    }
    content = _render(run=config.build(config.as_dict(_config()) | turned))
    for line in (
        "head_learning_rate: 0.001",
        "lr_scheduler_type: tri_stage",
        "lr_scheduler_warmup_ratio: 0.1",
        "lr_scheduler_hold_ratio: 0.4",
        "Weights: the exponential moving average over the updates, decay 0.999",
    ):
        assert f"- {line}" in content
        assert f"- {line.partition(':')[0]}:" not in _render() or line.startswith("lr_scheduler_t")
