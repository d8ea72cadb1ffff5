"""UCF101 (Soomro et al. 2012): 101 actions; clips cut from one longer video are a group.

    ROOT/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    LISTS/trainlist01.txt, testlist01.txt        `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`; 01, 02 or 03

Split 1 has 9,537 / 3,783 clips. Whole groups are held out of train for validation. About half of the clips have sound.
"""

from collections.abc import Iterator

from features.datasets.layout import VIDEO, Layout, Row


def read(layout: Layout) -> Iterator[Row]:
    """A row per clip of one official split: video, group, action."""
    videos = layout.media(*VIDEO)
    for split in ("train", "test"):
        for line in layout.lines(f"{split}list{layout.split:02d}.txt"):
            if line.strip():
                action, _, name = line.split()[0].removesuffix(".avi").partition("/")
                group = name.rpartition("_")[0].removeprefix("v_")
                yield {
                    "clip_id": name,
                    "video": videos.get(name),
                    "split": layout.held_out(group) if split == "train" else split,
                    "group": group,
                    "action": action,
                }
