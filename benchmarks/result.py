"""The one JSON line that every benchmark ends with."""

import json
from collections.abc import Mapping

import torch

from prosg_lib import provenance


def line(ratios: Mapping[str, float], goals: Mapping[str, float], lower_is_better: bool) -> str:
    """Ratios beside their goals, and what they were measured on."""
    facts = provenance.facts()
    return json.dumps(
        {
            "ratios": {name: round(ratios[name], 2) for name in goals},
            "goals": goals,
            "lower_is_better": lower_is_better,
            "device": facts["device"],
            "versions": facts["versions"],
            "threads": torch.get_num_threads(),
        }
    )
