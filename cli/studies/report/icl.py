from .document import Report


def report(recipe, finished):
    return Report(recipe.kind)


report_finetuned = report
