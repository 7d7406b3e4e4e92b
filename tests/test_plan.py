"""Planning a run: the arithmetic on programs of ours, the whole command on the CPU's compiler."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from flax_asr import (
    __main__,
    compilation,
    config,
    corpora,
    errors,
    experiment,
    parallel,
    partition,
    plan,
    static_shapes,
)
from flax_asr.console import terminal
from flax_asr.data import prepare
from flax_asr.estimate import chips, flops, hlo, outlook, workload
from flax_asr.models import wav2vec2

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [16, 10],
    "conv_stride": [16, 10],
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}
ROOT = pathlib.Path(__file__).parents[1]
V5E = chips.parse("v5e:2x4")


def tiny(**sections) -> config.Config:
    values = {
        "data": {"max_seconds": 2.0, "num_buckets": 2},
        "model": {"config": TINY},
        "train": {"per_device_train_batch_size": 2, "max_steps": 100, "global_batch_size": 8},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return config.build(values)


# Chips


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_a_chip_s_peak_is_its_clock_times_its_multipliers(chip):
    units = chip.flops / chip.clock_hz / (2 * 128 * 128)
    assert math.log2(units) == pytest.approx(round(math.log2(units)), abs=0.01)


def test_a_device_has_its_share_of_the_chip():
    v4 = chips.parse("v4:2x2x1")
    assert (v4.chips, v4.flops) == (4, 275e12 / 2)
    assert chips.parse("v5e:16x16").chips == 256


@pytest.mark.parametrize("topology", ["v5e-8", "v9:2x2", "v5e:2x2x1", "v4:2x2", "v5e:0x4", "h100"])
def test_an_unknown_slice_is_refused_with_an_example(topology, capsys):
    status = __main__.main(["plan", "--topology", topology, "--model.config.hidden_size", "16"])
    assert status == 2
    message = capsys.readouterr().err
    assert topology in message
    assert "for example v" in message


def test_without_libtpu_the_message_says_what_to_install(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else real(name, *a)
    )
    assert __main__.main(["plan", "--topology", "v5e:2x4"]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


# Prices of what has no estimate


def test_an_all_reduce_is_bounded_by_a_ring_in_one_direction():
    reduce = hlo.Operation("all-reduce", result_bytes=8_000, operand_bytes=8_000, group=8)
    assert outlook.bound_seconds(reduce, V5E) == pytest.approx(2 * 7_000 / 4.5e10)
    alone = dataclasses.replace(reduce, group=1)
    assert outlook.bound_seconds(alone, V5E) == 0


def test_a_custom_call_is_bounded_by_its_bytes_and_then_its_operations():
    kernel = hlo.Operation("custom-call", result_bytes=100, operand_bytes=300, flops=1e6)
    expected = 400 / V5E.hbm_bandwidth + 2e6 / 197e12
    assert outlook.bound_seconds(kernel, V5E) == pytest.approx(expected)


def test_parts_add_up_with_bounds_on_their_own_lines():
    found = [
        hlo.Operation("fusion", "x/attention/y", cycles=10, times=3),
        hlo.Operation("fusion", "x/attention/z", cycles=5),
        hlo.Operation("custom-call", "x/attention/k", operand_bytes=820, times=2),
        hlo.Operation("all-reduce", "x/psum", result_bytes=4500, operand_bytes=4500, group=2),
    ]
    priced = outlook.priced(found, V5E)
    assert priced["attention"] == 35
    assert priced["custom calls (bound)"] == pytest.approx(2 * 820 / 8.2e11 * 1.5e9)
    assert priced["collectives (bound)"] == pytest.approx(4500 / 4.5e10 * 1.5e9)
    assert len(priced) == 3


# Workload


def test_guessed_shapes_reach_the_longest_clip_in_whole_multiples_of_frames():
    work = workload.of(tiny(data={"max_seconds": 7.3, "num_buckets": 3}), 2)
    samples = work.data.train_shapes.samples
    assert len(samples) == 3
    assert 7.3 * 16_000 <= samples[-1] < 7.3 * 16_000 + 17 * 160
    assert all(wav2vec2.frame_lengths(work.objective.config, n) % 16 == 0 for n in samples)
    gaps = np.diff([0, *samples])
    assert max(gaps) - min(gaps) <= 2 * 16 * 160
    assert all(n % 8 == 0 for n in work.data.train_shapes.tokens)
    scored = work.data.eval_shapes.samples
    assert len(scored) == 2  # half as many, rounded up
    assert scored[-1] == samples[-1]
    assert work.data.updates == 100
    assert sum(work.data.train_portions) == pytest.approx(1)
    assert any("labels a second" in guess for guess in work.data.guesses)


@pytest.mark.parametrize(
    ("sections", "symbols"),
    [
        ({}, 64),
        ({"data": {"language": "cy"}}, 64),
        ({"data": {"language": "zh-HK"}}, 4000),
        ({"model": {"config": {**TINY, "vocab_size": 321}}}, 321),
    ],
)
def test_the_vocabulary_is_guessed_from_the_language(sections, symbols):
    work = workload.of(tiny(**sections), 2)
    assert work.objective.config.vocab_size == symbols
    assert work.state.trainable["lm_head/kernel"].shape == (16, symbols)
    assert any(f"{symbols} symbols" in guess for guess in work.data.guesses)


def test_a_well_known_encoder_is_planned_without_its_weights():
    model = config.ModelConfig(
        pretrained="facebook/wav2vec2-xls-r-300m", config={"layerdrop": 0.05}
    )
    found = workload.origin(model).model_config
    assert (found.hidden_size, found.num_hidden_layers, found.layerdrop) == (1024, 24, 0.05)
    objective = experiment.objective(config.Config(), workload.origin(model))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(experiment.parameter_shapes(objective)))
    head = 32 * 1024 + 32
    assert count - head == 315_438_720  # as the model card of XLS-R 300M's class counts it


@pytest.fixture
def prepared(tmp_path) -> config.Config:
    """A run whose clips lie there decoded."""
    rng = np.random.default_rng(0)
    rows = ["path,sentence,split"]
    for number in range(12):
        seconds = 0.5 + 0.125 * number
        audio = 0.1 * rng.standard_normal(int(16_000 * seconds))
        soundfile.write(tmp_path / f"{number}.wav", audio, 16_000)
        rows.append(f"{number}.wav,{'abc'[number % 3]} b,{'dev' if number > 9 else 'train'}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    cfg = tiny(
        data={
            "source": str(tmp_path / "clips.csv"),
            "language": "en",
            "train_splits": ["train"],
            "eval_splits": ["dev"],
            "test_splits": [],
            "prepared_dir": str(tmp_path / "prepared"),
        },
        train={"max_steps": None, "num_train_epochs": 3.0},
    )
    prepare.prepare(cfg)
    return cfg


def test_prepared_data_take_the_place_of_guesses(prepared):
    assert workload.is_prepared(prepared)
    work = workload.of(prepared, 2)
    assert work.data.guesses == ()
    assert work.data.updates == 3 * 2  # ten clips in updates of eight
    corpus = corpora.prepared(prepared, workload.origin(prepared.model))
    assert work.objective.config.vocab_size == corpus.vocabulary.size
    expected = static_shapes.training(prepared, work.objective.config, corpus.train)
    assert (work.data.train_shapes.samples, work.data.train_shapes.tokens) == (
        expected.samples,
        expected.tokens,
    )
    scored = list(corpus.scored().values())
    assert work.data.eval_shapes == static_shapes.scoring(prepared, work.objective.config, scored)
    assert len(work.data.eval_shapes.samples) == 1  # of two buckets
    assert work.data.audio_seconds == pytest.approx(sum(0.5 + 0.125 * n for n in range(10)) / 2)
    assert sum(work.data.scored_groups["eval"]) == 1


def test_data_that_are_not_decoded_are_not_touched(prepared, tmp_path):
    elsewhere = dataclasses.replace(
        prepared, data=dataclasses.replace(prepared.data, prepared_dir=str(tmp_path / "new"))
    )
    assert not workload.is_prepared(elsewhere)
    assert workload.of(elsewhere, 2).data.guesses != ()
    assert not (tmp_path / "new").exists()


def test_moments_that_are_cut_take_their_share_of_the_memory():
    whole, cut = (workload.of(tiny(train={"zero_sharding": on}), 4) for on in (False, True))
    assert whole.state_bytes == partition.tree_bytes(whole.state)
    assert cut.state_bytes == whole.state_bytes - cut.zero_sharding_bytes
    assert whole.zero_sharding_bytes == cut.zero_sharding_bytes
    assert whole.moment_bytes - cut.moment_bytes == cut.zero_sharding_bytes
    matrices = sum(p.size for p in cut.state.trainable.values() if p.ndim > 1)
    assert cut.zero_sharding_bytes == 2 * 4 * matrices * 3 / 4


# Outlook


def unscored(cfg: config.Config) -> workload.Workload:
    work = workload.of(cfg, 2)
    nothing = static_shapes.Shapes((), ())
    return dataclasses.replace(work, data=work.data._replace(eval_shapes=nothing))


def programs(work, temporary: int = 3 * 2**30):
    state = partition.tree_bytes(work.state)
    samples = work.data.train_shapes.largest[0]
    return [
        outlook.Program(
            "accumulate", 2, samples, 4_000, {"CTC": 3e9}, state + 300, temporary, 10, None, 60.0
        ),
        outlook.Program("update", 0, 0, 0, {"optimiser": 1.5e9}, state + 100, 50, 20, None, 5.0),
    ]


def test_an_update_is_its_micro_batches_and_one_move_of_the_parameters():
    cfg = tiny(data={"num_buckets": 1})
    work = unscored(cfg)
    seen = outlook.Outlook.of(cfg, work, programs(work), V5E)
    assert seen.update_seconds == pytest.approx(2 * 2.0 + 1.0)
    assert seen.peak_share == pytest.approx(2 * 4_000 / 5.0 / 197e12)
    assert seen.hours == pytest.approx(100 * 5.0 / 3600)
    assert seen.programs == 2


def test_an_update_of_one_program_moves_the_parameters_at_the_same_cost_in_every_shape():
    cfg = tiny(train={"global_batch_size": 4})
    work = unscored(cfg)
    accumulate, update = programs(work)
    both = dataclasses.replace(
        accumulate, function="update_from", by_part={**accumulate.by_part, **update.by_part}
    )
    apart, together = (
        outlook.Outlook.of(cfg, work, found, V5E) for found in ([accumulate, update], [both])
    )
    assert together.update_seconds == pytest.approx(apart.update_seconds)
    assert together.held_bytes["gradient sums"] == 0
    assert together.peak_bytes == both.peak_bytes + both.code_bytes
    assert together.largest_rows == 10  # 300 bytes of sums among the activations


def test_smaller_shapes_cost_in_proportion_to_their_operations():
    cfg = tiny()
    work = unscored(cfg)
    seen = outlook.Outlook.of(cfg, work, programs(work), V5E)
    short, long = work.data.train_shapes.samples
    ratio = short / long  # products grow with the length, attention with its square
    assert 1.0 + 4.0 * (1 + ratio**2) / 2 < seen.update_seconds < 1.0 + 4.0 * (1 + ratio) / 2


def test_a_shape_that_was_compiled_costs_what_the_compiler_says():
    cfg = tiny()
    work = unscored(cfg)
    accumulate, update = programs(work)
    short = dataclasses.replace(
        accumulate, samples=work.data.train_shapes.samples[0], by_part={"CTC": 2.4e9}, code_bytes=30
    )
    seen = outlook.Outlook.of(cfg, work, [accumulate, short, update], V5E)
    assert seen.update_seconds == pytest.approx(2 * (2.0 + 1.6) / 2 + 1.0)
    assert seen.held_bytes["programs"] == 10 + 30 + 20
    assert seen.programs == 3


def test_updates_of_the_head_alone_have_a_cost_of_their_own():
    cfg = tiny(data={"num_buckets": 1}, model={"config": TINY, "freeze_encoder_steps": 40})
    work = unscored(cfg)
    accumulate, update = programs(work)
    head = dataclasses.replace(accumulate, function="accumulate_head", by_part={"CTC": 0.75e9})
    seen = outlook.Outlook.of(cfg, work, [accumulate, head, update], V5E)
    assert seen.update_seconds == pytest.approx(5.0)
    assert seen.hours == pytest.approx((40 * (2 * 0.5 + 1.0) + 60 * 5.0) / 3600)
    assert seen.programs == 3


def test_a_run_may_end_before_the_encoder_is_trained():
    cfg = tiny(data={"num_buckets": 1}, model={"config": TINY, "freeze_encoder_steps": 100})
    work = unscored(cfg)
    accumulate, update = programs(work)
    head = dataclasses.replace(accumulate, function="accumulate_head")
    seen = outlook.Outlook.of(cfg, work, [head, update], V5E)
    assert seen.hours == pytest.approx(100 * 5.0 / 3600)


def test_the_gradient_of_the_head_alone_is_a_forward_pass_and_one_product():
    work = workload.of(tiny(), 2)
    model_config = work.objective.config
    head = flops.forward(model_config, 2, 16_000)["head"]
    assert work.flops("evaluate", 2, 16_000) + head == work.flops("accumulate_head", 2, 16_000)
    assert work.flops("accumulate_head", 2, 16_000) < work.flops("accumulate", 2, 16_000)
    assert work.flops("update", 0, 0) == 0


def test_memory_counts_what_is_there_at_once_and_the_batch_that_fits_follows():
    cfg = tiny(data={"num_buckets": 1})
    work = unscored(cfg)
    seen = outlook.Outlook.of(cfg, work, programs(work), V5E)
    state = partition.tree_bytes(work.state)
    assert seen.peak_bytes == state + 300 + 3 * 2**30 + 10 + 20
    assert seen.fits
    assert seen.largest_rows == 10  # 15.75 GiB at 1.5 GiB a clip
    crowded = programs(work, temporary=16 * 2**30)
    assert not outlook.Outlook.of(cfg, work, crowded, V5E).fits


def test_a_program_that_the_compiler_refused_leaves_no_times():
    cfg = tiny(data={"num_buckets": 1})
    work = unscored(cfg)
    accumulate, update = programs(work)
    refused = dataclasses.replace(accumulate, by_part={}, refused="RESOURCE_EXHAUSTED: 90.00G")
    seen = outlook.Outlook.of(cfg, work, [refused, update], V5E)
    assert not seen.fits
    assert (seen.update_seconds, seen.hours, seen.peak_share) == (None, None, None)
    json.dumps(seen.as_json())


def test_the_size_is_read_from_the_compiler_s_refusal():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (90.00G) exceeds available HBM (15.75G)."
    )
    assert plan._wanted_bytes(message) == 90 * 2**30


# The command

KEYS = "function rows samples cycles flops peak_bytes compile_seconds by_part".split()


def check_results(path: pathlib.Path, functions: list[str]):
    *compiled, run = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(program) for program in compiled] == [KEYS] * len(functions)
    assert [p["function"] for p in compiled] == functions
    for program in compiled:
        assert program["cycles"] == pytest.approx(sum(program["by_part"].values()), abs=20)
        assert program["peak_bytes"] > 0
    assert run["function"] == "run"
    assert run["fits"] is True
    return compiled, run


def test_the_command_on_the_compiler_of_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "describe", lambda described: parallel.Devices(jax.devices()[:2]))
    path = tmp_path / "plan.jsonl"
    plan.command(tiny(train={"zero_sharding": True}), "v5e:2x4", str(path))
    _, run = check_results(path, ["accumulate", "update", "evaluate"])
    assert run["updates"] == 100
    text = capsys.readouterr().out
    for words in (
        "never run",
        "guessed: 64 symbols",
        "optimiser moments",
        "train.zero_sharding saves 0.00 GiB of a device",
        "fits",
        "per_device_train_batch_size: about",
        "hours of audio an hour",
        "(bound)",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("train", "model", "functions"),
    [
        ({}, {}, "accumulate accumulate update evaluate"),
        ({"global_batch_size": 4}, {}, "update_from update_from evaluate"),
        (
            {},
            {"freeze_encoder_steps": 2},
            "accumulate accumulate_head accumulate accumulate_head update evaluate",
        ),
    ],
)
def test_every_program_of_a_run_is_listed_where_that_is_asked_for(train, model, functions):
    cfg = tiny(train=train, model={"config": TINY, **model})
    work, devices = workload.of(cfg, 2), parallel.Devices(jax.devices()[:2])
    every = [(job.function, job.samples) for job in plan.jobs(cfg, work, devices, True)]
    assert [name for name, _ in every] == functions.split()
    longest = {name: max(n for other, n in every if other == name) for name, _ in every}
    largest = [(job.function, job.samples) for job in plan.jobs(cfg, work, devices)]
    assert largest == list(dict.fromkeys(job for job in every if job[1] == longest[job[0]]))
    by_length = sorted(every, key=lambda job: -job[1])
    for name in longest:
        assert [job for job in every if job[0] == name] == [j for j in by_length if j[0] == name]


@pytest.mark.parametrize("global_batch_size", [4, 8])
def test_what_only_scores_is_compiled_as_such(monkeypatch, global_batch_size):
    asked = {True: {"scores": "1"}, False: {"trains": "1"}}
    monkeypatch.setattr(compilation, "options", lambda device, forward_only: asked[forward_only])
    cfg = tiny(train={"global_batch_size": global_batch_size})
    devices = parallel.Devices(jax.devices()[:2])
    for job in plan.jobs(cfg, workload.of(cfg, 2), devices):
        assert job.pmapped.options == asked[job.function == "evaluate"]
    assert parallel.lower(workload.of(cfg, 2).objective, devices).options == asked[True]


@pytest.fixture
def compiled_at_once(monkeypatch):
    """Programs on two fake devices, with made-up figures, in no time."""

    def compiled(job, described):
        parts, sizes = {"CTC": 1.5e6}, (job.resident, 2**20, 2**10)
        return outlook.Program(
            job.function, job.rows, job.samples, job.flops, parts, *sizes, None, 2.0, 3.0
        )

    monkeypatch.setattr(plan.Job, "compile", compiled)
    monkeypatch.setattr(plan, "describe", lambda described: parallel.Devices(jax.devices()[:2]))


def test_the_command_compiles_every_program_where_that_is_asked_for(
    tmp_path, compiled_at_once, capsys
):
    path = tmp_path / "plan.jsonl"
    plan.command(tiny(train={"global_batch_size": 4}), "v5e:2x4", str(path), every_shape=True)
    programs, run = check_results(path, ["update_from"] * 2 + ["evaluate"])
    assert run["programs"] == len(programs)
    assert (run["compile_seconds"], run["compile_cpu_seconds"]) == (6.0, 9.0)
    text = capsys.readouterr().out
    assert "all of them are compiled" in text
    assert "6 s here, 9 s of processor time, for 3 programs; a run compiles 3" in text


def test_an_update_of_one_micro_batch_is_one_program(tmp_path, compiled_at_once):
    path = tmp_path / "plan.jsonl"
    plan.command(tiny(train={"global_batch_size": 4}), "v5e:2x4", str(path))
    _, run = check_results(path, ["update_from", "evaluate"])
    assert run["bytes_by_kind"]["gradient sums"] == 0


@pytest.mark.parametrize(
    ("kept", "field", "shape"),
    [(True, "hidden_state", (2, 2, 100, 16)), (False, "audio", (2, 2, 16_000))],
)
def test_kept_features_are_planned_as_what_an_update_reads(kept, field, shape):
    names = "hidden_dropout attention_dropout activation_dropout feat_proj_dropout".split()
    quiet = dict.fromkeys([*names, "mask_time_prob", "mask_feature_prob"], 0.0)
    cfg = tiny(
        data={"cache_features": kept},
        model={"config": {**TINY, **quiet, "num_hidden_layers": 3}, "trainable_layers": 1},
    )
    objective = workload.of(cfg, 2).objective
    batch = parallel.Devices(jax.devices()[:2]).train_batch_shapes(objective, 2, 16_000, 8)
    assert getattr(batch, field).shape == shape


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(plan, "describe", lambda described: parallel.Devices(jax.devices()[:2]))
    with pytest.raises(errors.ConfigError, match="2 devices"):
        plan.command(tiny(train={"global_batch_size": 6}), "v5e:2x4", None)


def test_a_run_and_its_plan_compile_with_the_options_of_the_chip():
    asked = []

    class TooLarge(jax.stages.Lowered):
        def __init__(self):
            pass

        def compile(self, options):
            asked.append(options)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1.00G")

    mapped = types.SimpleNamespace(lower=TooLarge)
    function = compilation.Compilable(mapped, {"xla_of_the_chip": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError):
        compilation.compile_all({"update": (function, ())})
    assert plan.Job("update", 0, 0, 0, function, (), 0).compile(V5E).refused
    assert asked == [{"xla_of_the_chip": "1"}] * 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x4", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4"])
def test_the_command_on_the_real_tpu_compiler(tmp_path, topology, micro_batches):
    cfg = tiny(
        data={"max_seconds": 0.5, "num_buckets": 1},
        train={"global_batch_size": None, "gradient_accumulation_steps": micro_batches},
    )
    config.save(cfg, tmp_path / "tiny.yaml")
    path = tmp_path / "plan.jsonl"
    command = [sys.executable, "-m", "flax_asr", "plan", "--config", tmp_path / "tiny.yaml"]
    done = subprocess.run(
        [*command, "--topology", topology, "--json", path],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    learning = ["update_from"] if micro_batches == 1 else ["accumulate", "update"]
    compiled, _ = check_results(path, [*learning, "evaluate"])
    parts = compiled[0]["by_part"].keys()
    assert {"feature encoder", "attention", "feed-forward", "CTC"} <= parts
    moves = compiled[len(learning) - 1]["by_part"]
    assert "optimiser" in moves
    assert ("collectives (bound)" in moves) == (topology != "v5e:1x1")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4"])
def test_equal_layers_share_their_code_on_tpu(topology):
    devices = plan.describe(chips.parse(topology))
    weight = jax.ShapeDtypeStruct(
        (512, 512), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(devices.devices[0])
    )

    @jax.jit
    def layers(x, weights):
        for weight in weights:
            x += jnp.tanh(x @ weight)
        return x

    def code_bytes(count):
        lowered = layers.lower(weight, [weight] * count)
        compiled = lowered.compile(compilation.options(devices.devices[0]))
        return compiled.memory_analysis().generated_code_size_in_bytes

    assert code_bytes(16) < 2 * code_bytes(4)


def test_what_a_full_disk_does_not_take_is_one_message(compiled_at_once):
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        with pytest.raises(errors.ConfigError, match="the output cannot be written: No space left"):
            plan.command(tiny(train={"global_batch_size": 4}), "v5e:2x4", None)
        terminal.leave(full)
