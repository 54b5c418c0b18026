"""A notice of bitsandbytes that no user of ours can act on; for programs, never called by an import.

In: nothing.  Out: one exact message of one logger is dropped.
Idea: PEFT imports bitsandbytes wherever it is installed, and on a CPU with AVX512-BF16 bitsandbytes then says
that a compiled kernel of the package `kernels` is missing. That kernel serves repacked 4-bit layers alone,
which `four_bit.keep_gradients` never leaves in place, so nothing here is slower or other without it.
Source: bitsandbytes 0.50.2, backends/cpu/ops.py; bitsandbytes issue 2064.
"""

import logging

LOGGER, NOTICE = (
    "bitsandbytes.backends.cpu.ops",
    "Failed to load CPU gemm_4bit_forward from kernels-community",
)


def other_message(record: logging.LogRecord) -> bool:
    """Whether a log record is anything but the notice."""
    return not record.getMessage().startswith(NOTICE)


def drop_kernel_notice() -> None:
    """Call it before PEFT is imported; a second call changes nothing."""
    logging.getLogger(LOGGER).addFilter(other_message)
