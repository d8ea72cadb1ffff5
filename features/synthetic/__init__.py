"""A corpus of real mp4 files whose meaning is planted, so that what a model can reach is known exactly.

Every clip carries three tasks at once. `label` is shown by four unreliable cues, two in the picture and two in the
sound (colour and timbre at the shallow scale, the order of three events at the deep scale). `match` asks whether the
rhythms of picture and sound agree (the middle scale). `when` asks which pitch sounds in the quarter of the clip that
the picture marks. Position, brightness, texture, base pitch, gain, hiss and duration vary and mean nothing.
"""

from features.synthetic.semantics import ceilings
from features.synthetic.writing import generate

__all__ = ["ceilings", "generate"]
