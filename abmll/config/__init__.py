"""A run's configuration: YAML and overrides in, typed sections out."""

from .errors import ConfigError
from .load import load_config, resolve_path, save_config
from .schema import Config

__all__ = ["Config", "ConfigError", "load_config", "resolve_path", "save_config"]
