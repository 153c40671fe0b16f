class LMEvalMambaFinder:
    def find_spec(self, name, path=None, target=None):
        if name in ("lm_eval.models", "lm_eval.tasks._index"):
            try:
                from lm_eval_mamba.bridge import find_spec
            except ModuleNotFoundError:  # an editable install whose folder is gone
                return None
            return find_spec(self, name, path, target)


# site reads .pth files again when a folder is added twice.
if not any(type(finder).__name__ == "LMEvalMambaFinder" for finder in sys.meta_path):  # noqa: F821  (imported by the line)
    sys.meta_path.insert(0, LMEvalMambaFinder())  # noqa: F821
