"""Explorers: how long a callback takes, against drawing the same figure alone.

    python benchmarks/dashboard.py [--models 16] [--tasks 8] [--rounds 15] [--limit 150] [--out FILE.csv]

Invented tables of that size, no browser: from the change of a control to the message that leaves for it. Processor time, since the page waits for
nothing else; medians and the worst of the rounds. A median over the limit (milliseconds) ends with exit code 1."""
import argparse, itertools, os, statistics, sys, time
from types import SimpleNamespace

def moves(tables):
    "Name → (change a control, draw the same figure without the explorer)."
    from model_glue_nb.reporting.dashboard import ClusterExplorer, PerformanceExplorer, RoutingExplorer, SearchExplorer
    from model_glue_nb.reporting.example_run import EXPERTS
    c, p, s = ClusterExplorer(**tables), PerformanceExplorer(**tables), SearchExplorer(**tables)
    r = RoutingExplorer(**tables, mixture=SimpleNamespace(experts=EXPERTS, route=lambda x: [0]))
    def turn(control, values): return (lambda it=itertools.cycle(values): setattr(control, "value", next(it)))
    models = [tuple(p.names[i:i + 5]) for i in range(3)]
    yield "clusters: threshold", turn(c.threshold, [.6, .7, .8, .9, .97]), c.main_figure
    yield "clusters: metric", turn(c.metric, list(dict(c.metric.options).values())), c.main_figure
    yield "clusters: pair", turn(c.b, c.names[1:6]), lambda: [*c.pair_figures()]
    for view, control, values in (("scores", p.split, p.split.options),
                                  ("profiles", p.models, models), ("radar", p.models, models),
                                  ("best per task", p.split, p.split.options), ("gain", p.task, [v for _, v in p.task.options]),
                                  ("A against B", p.a, p.answers.models[:4])):
        p.view.value = view
        yield f"performance: {view}", turn(control, values), p.views[view]
    for view, control in (("trials", s.cluster), ("coefficients", s.cluster),
                          ("importance", s.cluster), ("Pareto front", s.x), ("attribution", s.cluster)):
        s.view.value = view
        yield f"search: {view}", turn(control, control.options), s.views[view]
    for view in r.views:
        yield f"routing: {view}", lambda v=view, it=itertools.cycle(r.views): (
            r.view.set_trait("value", next(it)), r.view.set_trait("value", v)), r.views[view]
    yield "routing: a letter", turn(r.prompt, ["a", "ab", "abc"]), None

def ms(f):
    start = time.process_time()
    f()
    return 1000 * (time.process_time() - start)

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--models", type=int, default=16)
    a.add_argument("--tasks", type=int, default=8)
    a.add_argument("--rounds", type=int, default=15)
    a.add_argument("--limit", type=float, default=150, help="milliseconds")
    a.add_argument("--out", help="CSV file")
    a = a.parse_args()
    import pandas as pd
    from model_glue_nb.reporting.example_run import invented_tables
    rows = []
    for what, move, draw in moves(invented_tables(a.models, a.tasks)):
        move()
        took = [ms(move) for _ in range(a.rounds)]
        alone = [ms(draw) for _ in range(a.rounds)] if draw else [float("nan")]
        m, d = statistics.median(took), statistics.median(alone)
        rows.append(dict(what=what, median_ms=m, worst_ms=max(took),
                         figure_ms=d, ratio=m / d, models=a.models,
                         tasks=a.tasks, load=os.getloadavg()[0]))
        print(f"{what:28} {m:7.1f} ms  worst {max(took):7.1f} ms  figure alone {d:6.1f} ms", flush=True)
    if a.out:
        with open(a.out, "w") as f:
            f.write(f"# python benchmarks/dashboard.py --models {a.models} --tasks {a.tasks} --rounds {a.rounds}; processor time\n")
            pd.DataFrame(rows).to_csv(f, index=False, float_format="%.4g")
    if slow := [r["what"] for r in rows if r["median_ms"] > a.limit]:
        sys.exit(f"over {a.limit:g} ms: {', '.join(slow)}")

if __name__ == "__main__": main()
