"""Pictures of recordings that show what is wrong with them: silence, noise, half a sentence."""

import urllib.parse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from flax_asr import audio, errors
from flax_asr.console import terminal


def draw(
    folder: Path, recordings: Iterable[tuple[str, str, Float32[np.ndarray, " _"]]]
) -> list[Path]:
    """Writes one PNG a recording into the folder; returns their paths.

    Args:
        folder: created if it does not exist; files are named by rank and clip.
        recordings: (clip id, description, samples at 16 kHz), the worst first.

    Raises:
        ConfigError: the folder cannot be written.
    """
    drawn = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, (clip, said, samples) in enumerate(recordings, 1):
            # The end of the id tells clips apart; quoted, it cannot lead to another folder.
            path = folder / f"{rank:02d}-{urllib.parse.quote(clip[-60:], safe='')[-120:]}.png"
            _draw(path, f"{terminal.plain(clip)}: {said}", samples)
            drawn.append(path)
    except OSError as error:
        raise errors.ConfigError(
            f"--spectrograms {folder} cannot be written: {errors.why(error)}."
        ) from error
    return drawn


def _draw(path: Path, title: str, samples: Float32[np.ndarray, " samples"]) -> None:
    # Without pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seconds = len(samples) / audio.SAMPLE_RATE_HZ
    decibels = audio.mel_decibels(samples)
    extent = (0, seconds, 0, len(decibels))
    picture = axes.imshow(decibels, origin="lower", aspect="auto", extent=extent)
    figure.colorbar(picture, label="dB below the loudest")
    axes.set(xlabel="seconds", ylabel="mel band")
    # Names are not formulas, and the font may lack their characters.
    axes.set_title(ascii(title)[1:-1], parse_math=False, fontsize=9)
    figure.savefig(path, format="png")
