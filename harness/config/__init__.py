"""From YAML and overrides to checked cells. The only folder that imports Hydra, OmegaConf and pydantic."""
