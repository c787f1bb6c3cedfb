"""A record of kind `bench`: read with checks, and its tables."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from calculators.units import format_bytes
from quantkit.bench.results import BF16, OURS, Bench, Cell, Limits, Machine, ModelRun, Peer, Reader, layers
from quantkit.errors import RecordError
from quantkit.report.fields import Fields
from quantkit.report.source import Source
from quantkit.report.tables import MISSING, markdown
