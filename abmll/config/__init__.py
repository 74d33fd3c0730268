"""A run's configuration: YAML and overrides in, typed sections out."""

from .errors import ConfigError, Refused
from .files import resolve_path
from .load import config_from, load_config, save_config
from .paths import with_absolute_paths
from .schema import Config
from .settings import override_texts, read_settings

__all__ = [
    "Config",
    "ConfigError",
    "Refused",
    "config_from",
    "load_config",
    "override_texts",
    "read_settings",
    "resolve_path",
    "save_config",
    "with_absolute_paths",
]
