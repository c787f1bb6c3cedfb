"""Everything quantkit raises on purpose.

QuantkitError                 one clear line that says what to do; the CLI exits with 1
├── ConfigError               a config.json or preset that is incomplete, unknown or contradictory
├── CheckpointError           a checkpoint on disk that is missing, truncated, inconsistent or refused
├── SchemeError               an unknown precision, or a matrix that a precision cannot hold
├── TokenizerError            a tokenizer that is missing or of an unknown kind
├── OutputError               an output that exists, does not fit on the disk or cannot be written
├── RecordError               a record that is not one of quantkit's, or lacks what a report needs
├── BackendError              a kernel backend that is asked for and missing, or a bad kernel argument
└── DeviceMemoryError         a GPU whose memory does not hold what was to run on it
"""


class QuantkitError(Exception):
    """Base of all errors whose message is meant for the person at the terminal."""


class ConfigError(QuantkitError):
    """A model configuration is incomplete, unknown or contradictory."""


class CheckpointError(QuantkitError):
    """A checkpoint is missing, truncated, inconsistent or refused."""


class SchemeError(QuantkitError):
    """A precision is unknown, or cannot hold a matrix."""


class TokenizerError(QuantkitError):
    """A tokenizer is missing or of an unknown kind."""


class OutputError(QuantkitError):
    """An output exists, does not fit on the disk, or cannot be written."""


class RecordError(QuantkitError):
    """A record is not one of quantkit's, or lacks what a report needs."""


class BackendError(QuantkitError):
    """A kernel backend is missing, or an operator was given a bad argument."""


class DeviceMemoryError(QuantkitError):
    """A GPU's memory does not hold what was to run on it."""


_NO_DEVICE_MEMORY = "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"


def is_device_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out, as torch's allocator, CUDA through torch or Triton, or cuBLAS say it."""
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_DEVICE_MEMORY)
