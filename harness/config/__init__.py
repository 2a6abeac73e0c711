"""From YAML and overrides to checked cells. The one importer of Hydra and OmegaConf."""
