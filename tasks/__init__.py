"""Task groups of lm-eval-mamba: YAML files with the data they embed. Installed as `lm_eval_mamba.tasks`."""
