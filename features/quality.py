"""How much of a clip truly decoded: figures that every sample carries into the index."""

import pyarrow as pa

QUALITY_SCHEMA = pa.schema(
    [
        ("salvaged", pa.bool_()),  # decord refused the picture and PyAV concealed the damage
        ("good_frames", pa.float32()),  # share of the sampled frames that decoded without concealment
        ("repeated_frames", pa.float32()),  # share of the sampled frames equal to the one before
        ("decoded_video", pa.float32()),  # seconds decoded over seconds declared
        ("decoded_audio", pa.float32()),
        ("silence", pa.float32()),  # share of the log-mel frames without sound
    ]
)
