"""What a product should take on a device: a prediction to hold beside measured times, never a result.

One token reads its packed weight once, so its time is that of the bytes at nine tenths of what a device copy moves,
and what a launch costs on the device.

Source: CUDA.md section 3.3.
"""

from __future__ import annotations

LAUNCH_US = 2.2  # of our kernels
DENSE_LAUNCH_US = 2.5  # of cuBLAS
SHARE = 0.90  # of a copy's bandwidth that a kernel which only reads can hope for
SCALE_BITS = 32  # alpha and beta of a group


def packed_bytes(rows: int, columns: int, bits: float, group_size: int = 128) -> float:
    """Bytes of codes and scales of a matrix.

    Examples
    --------
    >>> packed_bytes(4096, 4096, 3)
    6815744.0
    """
    return rows * columns * (bits + SCALE_BITS / group_size) / 8


def predicted_us(weight_bytes: float, copy_gbps: float, dense: bool = False) -> float:
    """Microseconds of a product with one token.

    Parameters
    ----------
    weight_bytes : float
    copy_gbps : float
        Bytes read and written by a device copy, in 1e9 per second.
    dense : bool
        float16 through cuBLAS instead of our kernels.

    Examples
    --------
    >>> round(predicted_us(packed_bytes(14336, 4096, 3), 4300), 1)
    8.4
    """
    return (DENSE_LAUNCH_US if dense else LAUNCH_US) + weight_bytes / (SHARE * copy_gbps * 1e3)
