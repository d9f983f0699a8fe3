"""The executed course for readers without Jupyter: as a site, and as a lecture."""
