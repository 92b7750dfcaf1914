"""Validate and render a Plano configuration with the released `planoai`, as `planoai up` does.

plano_render.py FOLDER [INTERFACE]: FOLDER/in.yaml becomes FOLDER/out.yaml and FOLDER/envoy.yaml;
INTERFACE is added to those that the schema knows.
"""

import os
import sys
from pathlib import Path

import planoai
import yaml

data = Path(planoai.__file__).parent / "data"
folder = Path(sys.argv[1])
schema = yaml.safe_load((data / "plano_config_schema.yaml").read_text())
for providers in ("model_providers", "llm_providers"):
    entry = schema["properties"][providers]["items"]["properties"]
    entry["provider_interface"]["enum"] += sys.argv[2:]
(folder / "schema.yaml").write_text(yaml.safe_dump(schema))
os.environ.update(
    TEMPLATE_ROOT=str(data),
    ENVOY_CONFIG_TEMPLATE_FILE="envoy.template.yaml",
    PLANO_CONFIG_SCHEMA_FILE=str(folder / "schema.yaml"),
    PLANO_CONFIG_FILE=str(folder / "in.yaml"),
    PLANO_CONFIG_FILE_RENDERED=str(folder / "out.yaml"),
    ENVOY_CONFIG_FILE_RENDERED=str(folder / "envoy.yaml"),
)

from planoai.config_generator import validate_and_render_schema  # noqa: E402

validate_and_render_schema()
