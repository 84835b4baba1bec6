"""Tuning: a choice for each layer within a budget (lepton tune)."""

from lepton_ai.tuning.budget import Budget
from lepton_ai.tuning.candidates import CANDIDATES
from lepton_ai.tuning.result import Point, TuneResult
from lepton_ai.tuning.tune import tune

__all__ = ["CANDIDATES", "Budget", "Point", "TuneResult", "tune"]
