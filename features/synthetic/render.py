"""From latent cues to one H.264/AAC mp4 file: a pulsing disc over texture, a chord of harmonics over hiss.

Picture: the disc's hue is the colour cue and the rate at which its size pulses the rhythm; three dark flashes (bar at
the left, bar on top, diagonal cross) come in the cued order; a bright border stands through the marked quarter.
Sound: one pitch per quarter, a formant band that is the timbre cue, loudness that swells at the rhythm's rate, and
three brief events (clicks, hiss, thump) in the cued order.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from features.synthetic.semantics import KINDS, ORDERS, Latents

SIZE = 64  # pixels, both sides
FPS = Fraction(25, 2)
SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = int(SAMPLE_RATE / FPS)
FRAMES = (46, 54)  # shortest and longest clip: 3.68 to 4.32 s

RATES = (1.0, 1.5, 2.2, 3.2)  # Hz, rhythm of picture and sound
PITCHES_HZ = (160.0, 240.0, 360.0, 540.0)
FORMANTS_HZ = (1200.0, 2000.0, 3300.0, 5400.0)
# Offsets of (U, V) from grey: purple, orange, green, blue. Equal chroma and luma drawn apart, so that neither
# brightness nor the size of the file gives the colour away.
CHROMA = ((55.0, 55.0), (-55.0, 55.0), (-55.0, -55.0), (55.0, -55.0))
EVENT_TIMES = (1 / 6, 3 / 6, 5 / 6)  # of the clip
EVENT_JITTER = 0.3  # seconds, either way
BORDER = 4  # pixels
WAVETABLE = 4096


def write_clip(latents: Latents, seed: int, path: Path) -> None:
    """Render one clip and encode it; the bytes are a function of (latents, seed) alone."""
    rng = np.random.default_rng([seed, 1, latents.index])
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    luma, chroma = draw_picture(latents, frames, rng)
    encode(luma, chroma, draw_sound(latents, frames, rng), path, audio_bit_rate=1000 * int(rng.integers(56, 73)))


def draw_picture(latents: Latents, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Luma (T, 64, 64) and chroma (T, 2, 32, 32), uint8, of the planted picture."""
    seconds = np.arange(frames) / float(FPS)
    background = rng.uniform(85, 150) + _texture(rng) * rng.uniform(5, 25)
    disc = _disc(seconds, RATES[latents.video_rate] * rng.uniform(0.97, 1.03), rng)
    luma = background * (1 - disc) + rng.uniform(110, 160) * disc
    flashes = _flashes(seconds, ORDERS[latents.video_order], rng)
    luma = luma * (1 - flashes) + rng.uniform(5, 25) * flashes
    border = np.pad(np.zeros((SIZE - 2 * BORDER,) * 2), BORDER, constant_values=1.0)
    quarter = np.minimum((np.arange(frames) + 0.5) * KINDS // frames, KINDS - 1)
    border = border * (quarter == latents.marked_quarter)[:, None, None]
    luma = luma * (1 - border) + rng.uniform(215, 235) * border
    # Grain of a strength of its own decides how many bits the picture takes: the size of a file tells no cue.
    luma += rng.standard_normal(luma.shape, dtype=np.float32) * np.exp(rng.uniform(np.log(2), np.log(14)))

    angle, saturation = rng.uniform(-0.14, 0.14), rng.uniform(0.85, 1.0)
    u, v = CHROMA[latents.colour]
    turned = np.array([u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)]) * saturation
    tinted = (disc * (1 - flashes) * (1 - border)).reshape(frames, SIZE // 2, 2, SIZE // 2, 2).mean(axis=(2, 4))
    chroma = 128 + tinted[:, None] * turned[:, None, None]
    return tuple(np.clip(plane + 0.5, 0, 255).astype(np.uint8) for plane in (luma, chroma))


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A still, blotchy picture (64, 64) in -1 .. 1 with blotches of a random size."""
    blotch = int(rng.choice([2, 4, 8]))
    coarse = rng.uniform(-1, 1, (SIZE // blotch, SIZE // blotch))
    return np.kron(coarse, np.ones((blotch, blotch)))


def _disc(seconds: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask (T, 64, 64) of a slowly drifting disc whose radius pulses at `rate` Hz."""
    pulse = np.sin(2 * np.pi * (rate * seconds + rng.random()))
    radius = rng.uniform(10, 13) * (1 + rng.uniform(0.35, 0.45) * pulse)
    centre = SIZE / 2 + rng.uniform(-7, 7, (2, 1))
    centre = centre + rng.uniform(0, 4) * np.sin(2 * np.pi * (rng.uniform(0.05, 0.25) * seconds + rng.random((2, 1))))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    distance = np.hypot(x - centre[0][:, None, None], y - centre[1][:, None, None])
    return np.clip(radius[:, None, None] - distance + 0.5, 0, 1)


def _flashes(seconds: np.ndarray, order: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Mask (T, 64, 64) of three brief shapes: bar at the left, bar on top, diagonal cross."""
    y, x = np.mgrid[:SIZE, :SIZE]
    shapes = (
        (x >= 6) & (x < 16),
        (y >= 6) & (y < 16),
        (abs(x - y) < 6) | (abs(x + y - SIZE + 1) < 6),
    )
    mask = np.zeros((len(seconds), SIZE, SIZE))
    for kind, start, length in zip(order, *_event_times(seconds, rng), strict=True):
        mask[(seconds >= start) & (seconds < start + length)] = shapes[kind]
    return mask


def _event_times(seconds: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths in seconds of the three events of a clip."""
    middle = np.array(EVENT_TIMES) * seconds[-1] + rng.uniform(-EVENT_JITTER, EVENT_JITTER, len(EVENT_TIMES))
    length = rng.uniform(0.26, 0.36, len(EVENT_TIMES))
    return middle - length / 2, length


def draw_sound(latents: Latents, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Mono samples (frames * 1280,), int16, of the planted sound."""
    samples = frames * SAMPLES_PER_FRAME
    seconds = np.arange(samples) / SAMPLE_RATE
    tone = _chords(samples, latents, rng)
    swell = np.sin(2 * np.pi * (RATES[latents.audio_rate] * rng.uniform(0.97, 1.03) * seconds + rng.random()))
    tone *= 1 - rng.uniform(0.75, 0.9) * (0.5 - 0.5 * swell)
    hiss = rng.standard_normal(samples) * np.exp(rng.uniform(np.log(0.003), np.log(0.02)))
    mixture = (tone + hiss + _noises(seconds, ORDERS[latents.audio_order], rng)) * rng.uniform(0.25, 0.9)
    return (np.clip(mixture, -1, 1) * 32_767).astype(np.int16)


def _chords(samples: int, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """One pitch per quarter: its fundamental, which is the pitch, and harmonics in a formant band, the timbre.

    The band lies at an absolute frequency, so that the timbre is the same whatever the pitch.
    """
    base = 2 ** rng.uniform(-0.12, 0.12)
    formant = FORMANTS_HZ[latents.timbre] * rng.uniform(0.96, 1.04)
    phases = np.exp(2j * np.pi * rng.random(WAVETABLE // 2 + 1))
    quarters = []
    for pitch, part in zip(latents.pitches, np.array_split(np.arange(samples), KINDS), strict=True):
        frequency = PITCHES_HZ[pitch] * base
        harmonics = np.arange(1, int(0.48 * SAMPLE_RATE / frequency) + 1)
        band = np.exp(-0.5 * (np.log2(harmonics * frequency / formant) / 0.3) ** 2)
        amplitude = band / np.linalg.norm(band)
        amplitude[0] += 1.0
        spectrum = np.zeros(WAVETABLE // 2 + 1, dtype=complex)
        spectrum[harmonics] = amplitude * phases[harmonics]
        table = np.fft.irfft(spectrum) * WAVETABLE / 8
        position = (np.arange(len(part)) * frequency / SAMPLE_RATE) % 1 * WAVETABLE
        edge = np.minimum(np.arange(len(part)), np.arange(len(part))[::-1]) / (0.008 * SAMPLE_RATE)
        quarters.append(np.interp(position, np.arange(WAVETABLE + 1), np.append(table, table[0])) * np.minimum(edge, 1))
    return np.concatenate(quarters)


def _noises(seconds: np.ndarray, order: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Three brief sounds: a burst of clicks, a breath of high noise, a low thump."""
    sound = np.zeros(len(seconds))
    for kind, start, length in zip(order, *_event_times(seconds, rng), strict=True):
        inside = np.flatnonzero((seconds >= start) & (seconds < start + length))
        local = seconds[inside] - start
        fade = np.sin(np.pi * local / length)
        if kind == 0:
            clicks = np.exp(-(local % 0.04) / 0.002)
            sound[inside] += clicks * rng.standard_normal(len(inside)) * 0.9
        elif kind == 1:
            sound[inside] += fade * np.diff(rng.standard_normal(len(inside) + 1)) * 0.3
        else:
            sound[inside] += fade * np.sin(2 * np.pi * 75 * local) * 0.9
    return sound


def encode(luma: np.ndarray, chroma: np.ndarray, sound: np.ndarray, path: Path, audio_bit_rate: int) -> None:
    """Write planes and samples as H.264 and AAC in mp4; one thread, for the same bytes on every run."""
    with av.open(str(path), "w", format="mp4") as container:
        # x264's macroblock tree reads memory it has not set at this picture size: the bytes differed between processes.
        h264 = {"preset": "veryfast", "crf": "25", "threads": "1", "x264-params": "mbtree=0"}
        picture = container.add_stream("libx264", rate=FPS, options=h264)
        picture.width = picture.height = SIZE
        picture.pix_fmt = "yuv420p"
        track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        track.bit_rate = audio_bit_rate
        for number, (y, uv) in enumerate(zip(luma, chroma, strict=True)):
            planes = np.concatenate([y.ravel(), uv.ravel()]).reshape(SIZE * 3 // 2, SIZE)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, 1 / FPS
            container.mux(picture.encode(frame))
            start = number * SAMPLES_PER_FRAME
            block = av.AudioFrame.from_ndarray(sound[None, start : start + SAMPLES_PER_FRAME], "s16", "mono")
            block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            container.mux(track.encode(block))
        container.mux(picture.encode(None))
        container.mux(track.encode(None))
