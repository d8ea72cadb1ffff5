"""When the pictures of a stream are shown, by what its packets say.

A packet's time is its picture's, with three exceptions (`Timing`): some containers state when packets are decoded, some
packets hold one field of a picture, and in MPEG's program streams several pictures may share the packet that states a
time.
"""

import math
from typing import Literal

import numpy as np
from av import Packet

from features.decode.media import stamp_of

# stated: a packet's time is its frame's. ordered: the file states when packets are decoded, and FFmpeg made up when
# they are shown: the frames, in the order in which they come out, have these times in their order. fields: a packet may
# be one field of a frame, or none at all: what is shown at a time is the last frame at or before it.
Timing = Literal["stated", "ordered", "fields"]

TICK = 1e-3  # s; decord rounds times to milliseconds, and a target often falls exactly on a frame's edge
BACK = 1.0  # s that times go back where a file begins anew; by less they may be out of order
JOINED = 10  # packets on either side, at least, whose times are those of the other side
MOST_LEFT = 3  # pictures without a time after the last one that has one


class Packets:
    """Collects when the packets of a segment are shown, from its key frame on.

    stamps: (shown, decoded) in s on the file's clock, of each packet. key: time of the first key frame after a seek, of
    what is shown before it packets may be missing. hidden: packets that the file's edit list cuts away; untimed:
    that have no time. whole: the stream was read from its first packet to its last. begins: it was read from its
    beginning, and that is a key frame.
    """

    def __init__(self, tick: float, zero: float, begin: float, stop: float | None, longest: float, seek: bool) -> None:
        self.tick, self.zero, self.begin, self.stop, self.longest = tick, zero, begin, stop, longest
        self.key = None if seek else -math.inf
        self.stamps: list[tuple[float, float | None]] = []
        self.lengths: list[float] = []
        self.hidden, self.untimed, self.whole, self.begins = 0, 0, not seek, not seek

    def add(self, packet: Packet) -> bool:
        """Take one more packet; whether more are needed."""
        stamp = stamp_of(packet)
        if self.key is None:
            if stamp is None or not packet.is_keyframe:
                return True
            self.key = self._seconds(stamp)
        if self.key > self.begin + TICK:
            return False
        if stamp is None or packet.is_discard:  # the empty packet at the end; what the file's edit list cuts away
            self.hidden += packet.is_discard
            self.untimed += stamp is None and packet.size > 0
            return True
        decoded = None if packet.dts is None else self._seconds(packet.dts)
        shown = self._seconds(stamp)
        self.begins = self.begins and (bool(self.stamps) or packet.is_keyframe)
        if shown <= self.longest:  # a broken timestamp would ask for hours of frames
            self.stamps.append((shown, decoded))
            self.lengths.append((packet.duration or 0) * self.tick)
            if self.stop is not None and decoded is not None and decoded > self.stop:
                self.whole = False
                return False
        return True

    def restart(self) -> float | None:
        """The time to which the packets' times go back for good, as where files were joined; None where they do not.

        Of a broken timestamp there are no others that are as late, or as early.
        """
        decoded = np.array([time for _, time in self.stamps if time is not None])
        if len(decoded) < 2:
            return None
        at = int(np.diff(decoded).argmin()) + 1
        late, early = (decoded[:at] > decoded[at]).sum(), (decoded[at:] < decoded[at - 1]).sum()
        back = decoded[at - 1] - decoded[at] > BACK
        return float(decoded[at]) if back and min(late, early) >= JOINED else None

    def leading(self) -> float | None:
        """When the key frame is shown with which a file begins, in which others are shown before it; else None."""
        first = self.stamps[0][0] if self.begins and self.stamps else -math.inf
        return first if any(shown < first for shown, _ in self.stamps) else None

    def drop_before(self, first: float) -> None:
        """Forget the packets that are shown before a time."""
        kept = [(stamp, length) for stamp, length in zip(self.stamps, self.lengths, strict=True) if stamp[0] >= first]
        self.stamps, self.lengths = [stamp for stamp, _ in kept], [length for _, length in kept]

    def finish(self, start: int | None, timing: Timing) -> tuple[np.ndarray, float]:
        """When frames appear (sorted, s), and when the last one goes."""
        if timing == "ordered" and (counted := self.counted()) is not None:
            return counted, min(counted[-1] + float(np.median(self.lengths)), self.longest)
        times = [shown for shown, _ in self.stamps]
        if timing == "ordered" and start is not None:
            decoded = [time for _, time in self.stamps if time is not None]
            first = self._seconds(start)
            if decoded and len(decoded) == len(times) and abs(min(decoded) - first) < abs(min(times) - first):
                times = decoded
        ends = (min(time + length, self.longest) for time, length in zip(times, self.lengths, strict=True))
        return np.sort(np.asarray(times)), max(ends, default=0.0)

    def counted(self) -> np.ndarray | None:
        """When frames appear (sorted, s), where those without a time of their own fit into the gaps between the others.

        They have none, or FFmpeg took another's, where several lie in one packet of the file's. None where all have
        one, or they do not fit, as in a damaged file.
        """
        stated, length = np.unique([shown for shown, _ in self.stamps]), float(np.median(self.lengths or [0]))
        missing = len(self.stamps) + self.untimed - len(stated)
        if not missing or not len(stated) or not length > 0:
            return None
        # Where reading has stopped, what is shown before the last picture may not have been read.
        cut = math.inf if self.whole or self.stop is None else self.stop
        later, stated = stated[stated > cut], stated[stated <= cut]
        steps = np.round(np.diff(stated) / length)
        left = missing - int((steps - 1).sum())  # they come after the last one that has a time
        uneven = np.abs(np.diff(stated) - steps * length) > length / 4
        if (steps < 1).any() or uneven.any() or not 0 <= left <= MOST_LEFT:
            return None
        runs = zip(stated, [*steps.astype(int), 1 + left], strict=True)
        return np.concatenate([*(begin + length * np.arange(count) for begin, count in runs), later])

    def _seconds(self, stamp: int) -> float:
        return stamp * self.tick - self.zero
