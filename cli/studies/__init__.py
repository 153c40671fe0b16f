"""Studies: a recipe becomes runs, runs become results, results become a report.

recipe -> kinds (which runs it asks for) -> runs (identity) -> store, runner, engines (doing them) -> report
"""
