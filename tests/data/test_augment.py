"""Augmented clips: the same after any history, within their bounds, with labels that still fit."""

import numpy as np
import pytest
from small_splits import add, write_split

from flax_asr import alignment, audio, config
from flax_asr.data import augment, buckets, examples, loader, shard_writer, shards
from flax_asr.vocabulary import Vocabulary

SENTENCES = ["abcde"[: 1 + i % 5] * (1 + i % 3) for i in range(23)]
LENGTHS = np.random.default_rng(0).integers(7000, 40_000, len(SENTENCES)).tolist()
LONGEST = 40_080
EVERYTHING = {
    "speed": (0.8, 1.25),
    "pitch": (-2.0, 2.0),
    "gain_db": (-6.0, 6.0),
    "noise_snr_db": (5.0, 20.0),
}


def frames(samples):
    return (samples - 80) // 320


def _examples(*splits):
    return examples.build(
        splits,
        normalize=str.strip,
        vocabulary=Vocabulary.from_transcripts(SENTENCES),
        frame_lengths=frames,
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), SENTENCES, samples=LENGTHS)


@pytest.fixture(scope="module")
def data(split):
    return _examples(split)


def _augmentation(data, *, seed=3, longest=LONGEST, **settings):
    return augment.Augmentation(
        config.AugmentConfig(**settings),
        data,
        seed,
        longest=longest,
        smallest_samples=buckets.smallest_samples,
        workers=2,
    )


def _values(clip):
    integers, gain = clip
    return integers.astype(np.float64) * gain


def _peak_hz(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * audio.SAMPLE_RATE_HZ / len(samples)


def test_a_clip_depends_on_seed_epoch_and_id_alone(data, split, tmp_path):
    other = write_split(tmp_path / "other", ["abc", "de"], samples=[9000, 8000], split="other")
    # The same clips behind two others: every row has another number.
    later = _examples(other, split)
    one, two = _augmentation(data, **EVERYTHING), _augmentation(later, **EVERYTHING)
    for row in (20, 0, 7):
        again = later.ids.index(data.ids[row])
        assert again != row
        ours, theirs = one.clip(5, row), two.clip(5, again)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        assert len(ours[0]) == one.lengths(5)[row]
        for changed in (one.clip(6, row), _augmentation(data, seed=4, **EVERYTHING).clip(5, row)):
            assert len(changed[0]) != len(ours[0]) or (changed[0] != ours[0]).any()


def test_draws_are_even_in_their_range_and_independent_of_each_other(data):
    free = _augmentation(data, longest=10**6, speed=(0.9, 1.1))
    louder = _augmentation(data, gain_db=(-6.0, 2.0))
    epochs = range(60)
    # Labels that leave room for any speed.
    rows = np.flatnonzero(data.label_lengths < 10)
    factors = np.array([(data.samples / free.lengths(epoch))[rows] for epoch in epochs])
    gains = np.array(
        [[louder.clip(e, row)[1] / data.gains[row] for row in rows[:4]] for e in epochs]
    )
    decibels = 20 * np.log10(gains)
    for drawn, low, high in ((factors, 0.9, 1.1), (decibels, -6, 2)):
        assert (drawn > low - 1e-4).all()
        assert (drawn < high + 1e-4).all()
        # Kolmogorov-Smirnov: beyond this once in a thousand times
        ordered = (np.sort(drawn, axis=None) - low) / (high - low)
        ladder = (np.arange(drawn.size) + 0.5) / drawn.size
        assert np.abs(ordered - ladder).max() < 1.95 / np.sqrt(drawn.size)
    one_another = np.corrcoef(factors[:, 0], factors[:, 1])[0, 1]
    purposes = np.corrcoef(factors[:, :4].ravel(), decibels.ravel())[0, 1]
    assert abs(one_another) < 0.5
    assert abs(purposes) < 0.25


def test_no_clip_becomes_longer_than_the_largest_shape_or_too_short_for_its_label(split):
    # Clips of which a quarter is just long enough for its label.
    data = _examples(split)
    needed = [alignment.min_frames(data.labels(row)) for row in range(len(data))]
    tight = {row: buckets.smallest_samples(needed[row]) for row in range(0, len(data), 4)}
    data.samples[list(tight)] = list(tight.values())
    assert (frames(data.samples) >= needed).all()
    lively = _augmentation(data, speed=(0.5, 2.0), longest=int(data.samples.max()))
    lengths = np.array([lively.lengths(epoch) for epoch in range(50)])
    assert (frames(lengths) >= needed).all()
    assert (lengths <= data.samples.max()).all()
    for row, samples in tight.items():
        assert lengths[:, row].min() >= samples
        assert lengths[:, row].max() > samples
    fast = _augmentation(data, speed=(1.5, 2.0)).lengths(0)
    assert (fast[list(tight)] == list(tight.values())).all()


def test_every_batch_of_an_augmented_epoch_fits_its_shape_and_keeps_its_labels(data):
    shapes = buckets.choose_shapes(data.samples, 4)
    lively = _augmentation(data, speed=(0.8, 1.25), longest=shapes[-1])
    plan = buckets.TrainPlan(data.samples, shapes, 4, 2, seed=1, lengths=lively.lengths)
    widths = loader.label_widths(data, shapes, fastest=1.25)

    def batches(start, count):
        with loader.updates(data, plan, start, tokens=widths, augmentation=lively) as found:
            return [next(found) for _ in range(count)]

    made = batches(0, 2 * plan.updates_per_epoch)
    seen = []
    for _, groups in made:
        for batch, group in groups:
            real = group.rows >= 0
            rows = group.rows[real]
            seen += rows.tolist()
            np.testing.assert_array_equal(
                batch.sample_lengths[real], plan.lengths(group.epoch)[rows]
            )
            assert batch.audio.shape[1] == shapes[group.shape]
            np.testing.assert_array_equal(batch.label_lengths[real], data.label_lengths[rows])
            for place, row in enumerate(rows.tolist()):
                labels = batch.labels[place, : batch.label_lengths[place]]
                np.testing.assert_array_equal(labels, data.labels(row))
                assert not batch.audio[place, batch.sample_lengths[place] :].any()
    assert sorted(seen) == sorted([*range(len(data))] * 2)
    # A resumed loader goes on with the same ones.
    for (_, ours), (_, theirs) in zip(made[-3:], batches(len(made) - 3, 3), strict=True):
        for (one, _), (other, _) in zip(ours, theirs, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_noise_is_as_loud_as_was_asked_for(data):
    noisy = _augmentation(data, noise_snr_db=(5.0, 20.0))
    found = []
    for row in range(12):
        clean = _values((data.audio(row), float(data.gains[row])))
        noise = _values(noisy.clip(0, row)) - clean
        found.append(10 * np.log10(np.square(clean).mean() / np.square(noise).mean()))
        assert abs(np.corrcoef(noise, clean)[0, 1]) < 0.06
    assert min(found) > 5 - 0.2
    assert max(found) < 20 + 0.2
    assert np.ptp(found) > 5


def test_exactly_one_level_of_noise_is_exact(data):
    clean = _values((data.audio(0), float(data.gains[0])))
    noise = _values(_augmentation(data, noise_snr_db=(10.0, 10.0)).clip(0, 0)) - clean
    # a standard deviation of the power of n normal numbers is sqrt(2 / n)
    measured = np.square(noise).mean() / np.square(clean).mean()
    assert measured == pytest.approx(0.1, rel=5 * np.sqrt(2 / len(clean)))


def test_noise_is_another_one_in_every_epoch_for_every_clip_and_seed(data):
    def noise(seed, epoch, row):
        noisy = _augmentation(data, seed=seed, noise_snr_db=(0.0, 0.0)).clip(epoch, row)
        return (_values(noisy) - _values((data.audio(row), float(data.gains[row]))))[:4000]

    one = noise(3, 0, 0)
    for other in (noise(3, 1, 0), noise(3, 0, 1), noise(4, 0, 0)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
    np.testing.assert_array_equal(one, noise(3, 0, 0))


@pytest.fixture(scope="module")
def sine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sine")
    tone = np.rint(20_000 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)).astype(np.int16)
    facts = shards.ClipFacts("a.mp3", "abc", "s", "", "", "")
    with shard_writer.ShardWriter(folder) as writer:
        add(writer, facts, tone, 1 / 32768)
        writer.finish(source="synthetic", release="cv-0", split="train")
    return _examples(shards.PreparedSplit.open(folder))


@pytest.mark.parametrize(
    ("settings", "hertz", "samples"),
    [
        ({"pitch": (4.0, 4.0)}, 440 * 2 ** (4 / 12), 32_000),
        ({"pitch": (-7.0, -7.0)}, 440 * 2 ** (-7 / 12), 32_000),
        ({"speed": (1.25, 1.25)}, 440 * 1.25, 25_600),
        ({"speed": (0.8, 0.8)}, 440 * 0.8, 40_000),
    ],
)
def test_pitch_and_speed_move_the_tone_of_a_sine(sine, settings, hertz, samples):
    integers, gain = _augmentation(sine, **settings).clip(0, 0)
    assert len(integers) == samples
    assert _peak_hz(integers) == pytest.approx(hertz, rel=0.01)
    # As loud as before, but for the ends.
    loudness = np.sqrt(np.square(_values((integers, gain))[4000:-4000]).mean())
    assert loudness == pytest.approx(20_000 / 32_768 / np.sqrt(2), rel=0.1)


def test_a_clip_shorter_than_the_vocoder_s_window_keeps_its_length():
    assert audio.shift_pitch(np.ones(100, np.float32), 3.0).shape == (100,)


def test_gain_alone_leaves_the_samples_as_they_are(data):
    integers, gain = _augmentation(data, gain_db=(6.0, 6.0)).clip(0, 3)
    np.testing.assert_array_equal(integers, data.audio(3))
    assert gain == pytest.approx(data.gains[3] * 10 ** (6 / 20))


def test_silence_stays_silence(sine, monkeypatch):
    monkeypatch.setattr(examples.Examples, "audio", lambda self, row: np.zeros(32_000, np.int16))
    integers, _ = _augmentation(sine, noise_snr_db=(0.0, 0.0), speed=(0.9, 0.9)).clip(0, 0)
    assert not integers.any()
