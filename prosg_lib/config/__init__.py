"""Profiles: the sizes of everything that is trained and measured, as plain data. Nothing here imports torch."""

from prosg_lib.config.profiles import PROFILES, get_profile
from prosg_lib.config.sizes import Profile

__all__ = ["PROFILES", "Profile", "get_profile"]
