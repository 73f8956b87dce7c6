"""Generates the reference pages that come from the code: `python -m scripts.docs`."""

from scripts.docs import api, cli, configuration
from scripts.docs.page import REFERENCE

for generator in (api, cli, configuration):
    (REFERENCE / generator.NAME).write_text(generator.render(), encoding="utf-8")
