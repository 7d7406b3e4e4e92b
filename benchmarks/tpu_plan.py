"""What the TPU compiler expects of one train step of XLS-R 300M on a v5e chip, or of another.

    python benchmarks/tpu_plan.py [--layers 24] [--rows 8] [--seconds 10]
        [--checkpointing] [--attention xla] [--dropout 0.1] [--layerdrop 0.1]
        [--micro-batches 1] [--json FILE]
    python benchmarks/tpu_plan.py --encoder xls-r-1b --topology v5e:2x4 --zero-sharding
        --checkpointing --rows 4

The work is that of the deleted Hugging Face Flax class's baseline: 8 clips of 10 s, bf16, 4000
symbols, 40 labels, feature encoder frozen, no dropout (with --dropout, in every place of the
layers: attention weights, activations, residuals), no SpecAugment, no rematerialisation. Needs
libtpu (`pip install '.[tpu]'`), no TPU; takes minutes of every core.
"""

import argparse
import dataclasses

import sidebyside
import train_step

from flax_asr import config, parallel, plan, static_shapes
from flax_asr.estimate import chips, flops, outlook, workload

BASELINE_ENCODER = "xls-r-300m"
BASELINE_CYCLES = 174.5e6  # the deleted class with optax.ctc_loss, the whole step, same compiler
BASELINE_BYTES = 8.1e9
BASELINE_COMPILE_SECONDS = 173
DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout")
SYMBOLS, TOKENS, SAMPLE_RATE_HZ = 4000, 40, 16_000


def configuration(arguments: argparse.Namespace, devices: int) -> config.Config:
    model_config = {**train_step.QUIET, "vocab_size": SYMBOLS}
    model_config |= dict.fromkeys(DROPOUTS, arguments.dropout)
    model_config["layerdrop"] = arguments.layerdrop
    if arguments.layers is not None:
        model_config["num_hidden_layers"] = arguments.layers
    return config.build(
        {
            "data": {"max_seconds": arguments.seconds, "num_buckets": 1, "eval_splits": []},
            "model": {
                "pretrained": f"facebook/wav2vec2-{arguments.encoder}",
                "config": model_config,
                "attention": arguments.attention,
            },
            "train": {
                "per_device_train_batch_size": arguments.rows,
                "global_batch_size": arguments.micro_batches * arguments.rows * devices,
                "max_steps": 1000,
                "gradient_checkpointing": arguments.checkpointing,
                "zero_sharding": arguments.zero_sharding,
            },
        }
    )


def workload_of(cfg: config.Config, seconds: float, devices: int) -> workload.Workload:
    """The planned workload with exactly so many samples and labels, and without evaluation."""
    work = workload.of(cfg, devices)
    exact = static_shapes.Shapes((int(seconds * SAMPLE_RATE_HZ),), (TOKENS,))
    data = work.data._replace(train_shapes=exact, eval_shapes=static_shapes.Shapes((), ()))
    return dataclasses.replace(work, data=data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--encoder", default=BASELINE_ENCODER, help="facebook/wav2vec2-...")
    parser.add_argument("--layers", type=int, help="in place of the encoder's own number")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--zero-sharding", action="store_true")
    parser.add_argument("--micro-batches", type=int, default=1, help="of an update")
    parser.add_argument("--attention", default="auto", help="xla: without our attention kernel")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--layerdrop", type=float, default=0.0)
    parser.add_argument("--json", metavar="FILE", help="also write one object a program there")
    arguments = parser.parse_args()

    described = chips.parse(arguments.topology)
    devices: parallel.Devices = plan.describe(described)
    cfg = configuration(arguments, devices.count)
    work = workload_of(cfg, arguments.seconds, devices.count)
    programs = []
    for job in plan.jobs(cfg, work, devices):
        programs.append(job.compile(described))
        print(plan.describe_program(programs[-1], described), flush=True)
    cpu_seconds = sum(program.compile_cpu_seconds for program in programs)
    if programs[0].refused:
        raise SystemExit("does not fit")

    learn = programs[0]
    cycles = sum(program.cycles for program in programs) + (
        (arguments.micro_batches - 1) * learn.cycles
    )
    seconds = cycles / described.chip.clock_hz
    peak = max(program.peak_bytes for program in programs)
    count = arguments.micro_batches * learn.flops
    share = count / seconds / described.flops
    compiled = sum(program.compile_seconds for program in programs)
    layers = work.objective.config.num_hidden_layers
    print(
        f"\n{arguments.encoder}, {layers} layers, {arguments.rows} x {arguments.seconds:g} s a"
        f" device, {described.name}"
    )
    print(f"                           ours   {BASELINE_ENCODER} of the deleted class   ratio")
    for name, ours, theirs in (
        ("M cycles of an update", cycles / 1e6, BASELINE_CYCLES / 1e6),
        ("peak GB", peak / 1e9, BASELINE_BYTES / 1e9),
        ("compile seconds", compiled, BASELINE_COMPILE_SECONDS),
    ):
        print(f"{name:22s} {ours:8.1f} {theirs:31.1f} {ours / theirs:7.2f}")
    print(f"compilation took {cpu_seconds:.0f} s of CPU time, over all cores")
    print(f"{1e3 * seconds:.1f} ms, {100 * share:.0f} % of peak ({count:.3g} FLOPs)")
    print("\ncycles worth its FLOPs at peak, by part:")
    counted = flops.gradient(
        work.objective.config, arguments.rows, work.data.train_shapes.samples[0], work.is_trained
    )
    for part, count in counted.items():
        ideal = count / described.flops * described.chip.clock_hz
        found = learn.by_part[part]
        print(f"  {part:24s} {ideal / 1e6:7.2f} M of {found / 1e6:7.2f} M")
    bounds = {
        name: value
        for program in programs
        for name, value in program.by_part.items()
        if name.endswith(outlook.NO_ESTIMATE)
    }
    print("bounds of ours among them:", {k: round(v) for k, v in bounds.items()})
    sidebyside.write_json(arguments.json, (program.as_json() for program in programs))


if __name__ == "__main__":
    main()
