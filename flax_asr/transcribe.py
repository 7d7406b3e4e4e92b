"""`flax-asr transcribe`: the text of audio files of any length.

A long recording is split into overlapping windows. The frames of neighbouring windows coincide
exactly, so each window contributes its middle, and symbols are collapsed once, over the whole file.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float32, Int

from flax_asr import alignment, audio, compilation, criterion, errors, loading, parallel, step
from flax_asr.console import model_options, progress, results, terminal
from flax_asr.data import buckets, loader
from flax_asr.hosts import cluster
from flax_asr.models import wav2vec2

WINDOW_SECONDS = 30.0
"""Length of a window; shorter recordings are not split."""
OVERLAP_SECONDS = 10.0
"""Overlap of neighbouring windows; each drops half of it."""
SHAPE_SECONDS = (2.0, 4.0, 8.0, 16.0)
"""Recordings are padded to one of these lengths or to a window, so that programs are few."""


@dataclass(frozen=True)
class Window:
    """A window of samples, and the range [first, last) of its frames that are kept."""

    start_sample: int
    end_sample: int
    first_frame: int
    last_frame: int


@dataclass(frozen=True, eq=False)
class _Heard:
    path: str
    samples: Float32[np.ndarray, " samples"]
    windows: list[Window]
    failure: errors.AudioError | None


def command(
    model: str, files: Sequence[str], json_file: str | None, overrides: Sequence[str] = ()
) -> int:
    """`flax-asr transcribe`: prints the text of each file; returns the exit status.

    Args:
        model: as for `loading.load`.
        files: recordings in any format that libsndfile reads.
        json_file: file for JSON lines, one object per recording; "-" is standard output.
        overrides: options of the configuration: batch size and precision.

    Raises:
        ModelError, CheckpointError, ConfigError: the model cannot be loaded or used with these
            options, or an option has no effect.
    """
    model_options.check("transcribe", overrides)
    cluster.devices()
    loaded = loading.load(model)
    cfg = loading.configure(loaded, overrides)
    recogniser = Recogniser(loaded, cfg.train.mixed_precision, cfg.train.per_device_eval_batch_size)
    failed = 0
    with (
        results.writer(json_file) as write,
        progress.Progress(len(files), "transcribing", "files") as bar,
    ):
        for path, found in recogniser.texts(files):
            line: dict[str, str | None] = {"path": path, "text": None}
            if isinstance(found, errors.AudioError):
                failed += 1
                line["error"] = str(found)
                bar.write(f"flax-asr: {path}: {found}")
            else:
                line["text"] = found
                shown = found if len(files) == 1 else f"{path}\t{found}"
                terminal.show(shown, results.people(json_file))
            write(line)
            bar.advance()
    if failed:
        terminal.tell(
            f"flax-asr: {failed} of {len(files)} files could not be transcribed", sys.stderr
        )
    return errors.STATUS if failed else 0


class Recogniser:
    """A model on one device.

    Args:
        loaded: the model.
        mixed_precision: fp32, bf16 or fp16.
        rows: number of windows computed at once, if so many have the same length.
    """

    def __init__(self, loaded: loading.LoadedModel, mixed_precision: str, rows: int):
        self._model, self._rows, self._precision = loaded, rows, mixed_precision
        self._devices = parallel.Devices(jax.local_devices()[:1])
        self._params = self._devices.replicate(step.flat(loaded.params))
        self._evaluate = parallel.evaluate(loaded.objective(mixed_precision), self._devices)
        self._programs: dict[tuple[int, int], Callable] = {}
        self._shapes = tuple(self._samples(seconds) for seconds in (*SHAPE_SECONDS, WINDOW_SECONDS))

    def texts(self, files: Sequence[str]) -> Iterator[tuple[str, str | errors.AudioError]]:
        """(Path, text or error) of each file, in order."""
        waiting: list[_Heard] = []
        for path in files:
            waiting.append(self._hear(path))
            if sum(len(heard.windows) for heard in waiting) >= self._rows:
                yield from self._flush(waiting)
                waiting = []
        yield from self._flush(waiting)

    def _hear(self, path: str) -> "_Heard":
        try:
            samples = audio.decode(path)
            return _Heard(path, samples, self.windows(len(samples)), None)
        except errors.AudioError as error:
            # The text of silence is empty.
            failure = None if error.reason == "silent" else error
            return _Heard(path, np.zeros(0, np.float32), [], failure)

    def _flush(self, waiting: Sequence["_Heard"]) -> Iterator[tuple[str, str | errors.AudioError]]:
        pieces = [
            heard.samples[window.start_sample : window.end_sample]
            for heard in waiting
            for window in heard.windows
        ]
        ids = iter(self._symbols(pieces))
        writes = self._model.vocabulary
        for heard in waiting:
            found = list(itertools.islice(ids, len(heard.windows)))
            if any(symbols is None for symbols in found):
                yield heard.path, errors.AudioError("overflow", loading.overflow(self._precision))
                continue
            windows = zip(found, heard.windows, strict=True)
            kept = [symbols[w.first_frame : w.last_frame] for symbols, w in windows]
            path = np.concatenate(kept) if kept else np.zeros(0, np.int32)
            text = writes.decode(alignment.greedy_collapse(path, writes.blank))
            yield heard.path, heard.failure or text

    def windows(self, samples: int) -> list[Window]:
        """The windows of a recording.

        Raises:
            AudioError: it is shorter than a frame.
        """
        config = self._model.config
        total = int(wav2vec2.frame_lengths(config, samples))
        if total == 0:
            raise errors.AudioError("too_short", f"{samples} samples are too few for a frame")
        size = self._shapes[-1]
        if samples <= size:
            return [Window(0, samples, 0, total)]
        stride = math.prod(config.conv_stride)
        frames = int(wav2vec2.frame_lengths(config, size))
        hop = frames - round(OVERLAP_SECONDS * audio.SAMPLE_RATE_HZ / stride)
        # The last window ends with the recording and is as long as the others.
        starts = [*range(0, total - frames, hop), total - frames]
        cuts = [(left + frames + right) // 2 for left, right in itertools.pairwise(starts)]
        return [
            Window(start * stride, start * stride + size, first - start, last - start)
            for start, first, last in zip(starts, [0, *cuts], [*cuts, total], strict=True)
        ]

    def _samples(self, seconds: float) -> int:
        """The fewest samples of at least this duration that give a multiple of 16 frames."""
        config = self._model.config
        frames = seconds * audio.SAMPLE_RATE_HZ / math.prod(config.conv_stride)
        rounded = math.ceil(frames / buckets.FRAME_MULTIPLE) * buckets.FRAME_MULTIPLE
        return buckets.smallest_samples(rounded, config.conv_kernel, config.conv_stride)

    def _symbols(
        self, pieces: Sequence[Float32[np.ndarray, " _"]]
    ) -> list[Int[np.ndarray, " _"] | None]:
        """The most likely symbol of each real frame of each piece; None for a piece with NaN."""
        by_shape: dict[int, list[int]] = {}
        for place, piece in enumerate(pieces):
            by_shape.setdefault(self._padded(len(piece)), []).append(place)
        found: list[np.ndarray | None] = [None] * len(pieces)
        for shape, places in by_shape.items():
            while places:
                # Full batches, then one by one: two programs for each shape, and no filler rows.
                rows = self._rows if len(places) >= self._rows else 1
                taken, places = places[:rows], places[rows:]
                batch = _batch([pieces[place] for place in taken], shape)
                (placed,) = self._devices.micro_batches(batch, rows)
                program = self._program((rows, shape), placed)
                losses, ids, lengths = jax.device_get(program(self._params, placed))
                for row, place in enumerate(taken):
                    if not np.isnan(losses[row]):
                        found[place] = ids[row, : lengths[row]]
        return found

    def _program(self, key: tuple[int, int], placed: criterion.Batch) -> Callable:
        """The compiled program for `key`, (rows, samples), the shape of `placed`."""
        if key not in self._programs:
            job = self._evaluate, (self._params, placed)
            self._programs |= compilation.compile_all({key: job})
        return self._programs[key]

    def _padded(self, samples: int) -> int:
        if not self._model.ignores_padding:
            # The text must not depend on padding, so every length has a program.
            return samples
        return next((shape for shape in self._shapes if shape >= samples), samples)


def _batch(pieces: Sequence[Float32[np.ndarray, " _"]], samples: int) -> loader.Batch:
    """A batch without labels; its audio is the decoder's float32, not rounded to int16."""
    rows = len(pieces)
    heard = np.zeros((rows, samples), np.float32)
    for place, piece in enumerate(pieces):
        heard[place, : len(piece)] = piece
    return loader.Batch(
        audio=heard,
        gains=np.ones(rows, np.float32),
        sample_lengths=np.array([len(piece) for piece in pieces], np.int32),
        labels=np.zeros((rows, 1), np.int32),
        label_lengths=np.zeros(rows, np.int32),
        weights=np.ones(rows, np.float32),
    )
