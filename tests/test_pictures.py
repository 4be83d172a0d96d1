"Figures of zoos of every kind, measured in a real Chromium: nothing overlaps, nothing is cut, cells are square, text can be read."
import json, math
import numpy as np, pandas as pd, pytest
from test_browser import chromium, watched  # noqa: F401

pytestmark = pytest.mark.browser
SIZES = "7b-instruct-v1.2-GPTQ 13b-chat-v1.3-AWQ 7b-v2-hf 70b-instruct-uncensored-v2.1-GGUF 7b-instruct-v1.3-GPTQ".split()
HUB = [f"{owner}-{kind}-{size}" for owner, kind in
       [("NousResearch/Nous-Hermes", "Llama-2"), ("NousResearch/Nous-Hermes", "Mistral"), ("WizardLM/WizardMath", "Llama-2"),
        ("WizardLM/WizardCoder-Python", "Llama-2"), ("elyza/ELYZA-japanese", "日本語の会話に強い言語モデル"), ("rinna/日本語", "大規模言語モデル-llama")] for size in SIZES]
LM_EVAL = ["leaderboard_bbh_" + t for t in ("boolean_expressions causal_judgement date_understanding disambiguation_qa formal_fallacies "
           "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects movie_recommendation").split()] + ["日本語の一般常識問題(JCommonsenseQA)", "gsm8k"]

def square(names, rng):
    s = pd.DataFrame(np.clip(.6 + .4 * rng.random((len(names),) * 2), 0, 1), names, names)
    s = (s + s.T) / 2
    for i, n in enumerate(names): s.loc[n, n] = 1.
    return s

def scores_of(models, tasks, rng):
    p = rng.uniform(.02, .99, (len(models), len(tasks)))
    return pd.DataFrame([(m, t, "report", p[i, j], .02, 500) for i, m in enumerate(models) for j, t in enumerate(tasks)],
                        columns="model task split score stderr n".split())

def comparison_of(tasks, missing):
    c = pd.DataFrame([(s, s, m, m - .02, m + .02, 500, m - .58, m - .6, m - .56, 5e5 * k, 5e5, k) for s, m, k in
                      [("best_single", .58, 1), ("best_merge", .6, 1), ("full_merge", .51, 1), ("full_mixture", .86, 9), ("model_glue", .81, 2), ("oracle_task", .9, 9)]],
                     columns="system model mean low high n gain gain_low gain_high params_total params_active ms_per_question".split())
    c.loc[len(c)] = {**c.iloc[4], "system": "chosen"}
    for t in tasks: c[t] = c["mean"]
    if missing: c.loc[2, ["mean", "low", "high", "gain", "params_total"]] = math.nan
    return c

def figures(models, tasks, seed=0, missing=False):
    "Every public plot of one zoo."
    from model_glue_nb.mergeability.clusters import grow_tree
    from model_glue_nb.reporting import plots as P
    from model_glue_nb.reporting.cluster_explorer import branches
    rng, n, about = np.random.default_rng(seed), len(models), ("leaderboard-of-everything-v2", 0)
    scores, s, colours = scores_of(models, tasks, rng), square(models, rng), P.model_colours(models, ["a-merged"])
    comparison = comparison_of(tasks, missing)
    gains = pd.DataFrame([(m, "mean", g, g - .03, g + .03, 3500) for m, g in zip(models, rng.normal(0, .1, n))], columns="model task gain low high n".split())
    parts = [("model", m) for m in models] + [("layers", f"layers {i}–{i}") for i in range(4)]
    left_out = pd.DataFrame([(k, m, t, c, c - .02, c + .02, 60) for k, m in parts for t in [*tasks, "mean"] for c in [rng.normal(-.03, .05)]],
                            columns="kind left_out task change low high n".split())
    weights = pd.DataFrame([("A", "linear", i, .5 + .1 * w[0], m, v) for i, w in enumerate(rng.random((120, n))) for m, v in zip(models, w)],
                           columns="cluster method trial score name value".split())
    routed = [*models, "a-merged"]
    share = rng.dirichlet([.3] * len(routed), len(tasks))
    routing = pd.DataFrame([("model_glue", e, t, share[i, j], .9, 50) for i, t in enumerate(tasks) for j, e in enumerate(routed)],
                           columns="system expert task share score n".split())
    lost = pd.DataFrame([(a, b, int(rng.integers(1, 900)), 1) for a in models for b in models if a == b or rng.random() < .3], columns="oracle expert n lost".split())
    trials = pd.DataFrame([(c, m, i, .5 + .01 * i, .5 + .01 * i) for c in ["A", models[0]] for m in ("linear", "task_arithmetic", "ties") for i in range(9)],
                          columns="cluster method trial score best".split())
    duel = pd.DataFrame([(t, 9, 3, 4, 5) for t in tasks], columns="task both only_a only_b neither".split())
    sizes = pd.DataFrame(dict(stored=[1, 1.2, 2.5], n_experts=[1, 2, 3], report=[.6, .7, .8], low=[.58, .68, .78], high=[.62, .72, .82], experts=[models[0], "; ".join(models[:2]), "; ".join(models[:9])]))
    front = pd.DataFrame(rng.random((9, 2)), columns=["one " + tasks[0], "two " + tasks[-1]]).assign(trial=range(9), score=.5, front=[True, False] * 4 + [True])
    layers = pd.DataFrame([(models[0], models[-1], "cosine", r, i, .9) for r in ("attn", "mlp", "norm", "other") for i in range(6)], columns="a b metric role layer value".split())
    pair = pd.DataFrame([("forecast, models unseen", .01, 0., .02, math.nan), ("measured on search", -.02, -.03, 0., 540)], columns="what change low high n".split())
    way = pd.DataFrame(dict(alpha=[0, .5, 1], loss=[1., 2, 1], loss_error=[.1, .1, .1]))
    cut = [dict(name="A", members=models[:2 * n // 3 + 1]), *(dict(name=m, members=[m]) for m in models[2 * n // 3 + 1:])]
    if missing:
        scores.loc[::5, "score"] = math.nan
        gains.loc[0, "gain":"high"] = math.nan
        left_out.loc[::7, "change":"high"] = math.nan
        s.iloc[0, 1:] = s.iloc[1:, 0] = math.nan
    tree = grow_tree(s) if n > 1 and not missing else None
    ends = (models[0], models[-1])
    out = dict(similarity=P.plot_similarity(s, cut, .95, colours=colours), scores=P.plot_scores(scores, *about, colours=colours),
               parallel=P.plot_parallel(scores, models[:5], *about, colours=colours), radar=P.plot_radar(scores, models[:3], *about, colours=colours),
               best=P.plot_best(scores, *about, colours=colours), gains=P.plot_gains(gains, models[-1], "mean", *about, colours),
               duel=P.plot_duel(duel, *ends, *about, colours), comparison=P.plot_comparison(comparison, *about), frontier=P.plot_frontier(sizes, comparison, *about),
               point=P.plot_point(pd.DataFrame(dict(task=tasks, score=.5)), comparison, "1.2 models", *about), routing=P.plot_routing(routing, None, *about, colours),
               confusion=P.plot_confusion(lost, "model_glue", *about, colours), cost=P.plot_cost(comparison, "params_total", *about),
               route=P.plot_route(models[:12], list(rng.random(min(n, 12))), models[0], colours), trials=P.plot_trials(trials, *about),
               coefficients=P.plot_coefficients(weights, 0, colours), importance=P.plot_importance(pd.DataFrame(dict(name=models, importance=rng.random(n) / n, n=40)), colours),
               attribution=P.plot_attribution(left_out, 0, colours), front=P.plot_front(front, *front.columns[:2], 0), layers=P.plot_layers(layers, *ends, "cosine"),
               pair=P.plot_pair(pair, ends), barrier=P.plot_barrier(way, ends, 90), nothing=P.plot_pair(None, ends))
    if tree: out["tree"] = P.plot_similarity(s.iloc[tree.order, tree.order], tree.cut(.8), .8, branches(tree, tree.cut(.8)), colours=colours)
    return out

ZOOS = dict(hub=(HUB, LM_EVAL), short=(["a-base", "a-rev", "b-base", "c-inc"], "reverse sort increment maximum swap".split()),
            one=(HUB[:1], LM_EVAL[:1]), missing=(HUB[10:22], LM_EVAL[:5], 1, True))

MEASURE = r"""async figures => {
  const light = c => { const [r, g, b] = c.match(/[\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b }
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)]; return (Math.max(x, y) + .05) / (Math.min(x, y) + .05) }
  const out = []
  for (const [name, fig] of Object.entries(figures)) {
    document.body.replaceChildren()
    const el = document.body.appendChild(document.createElement('div')), say = w => out.push(`${name}: ${w}`)
    el.id = name
    el.style.cssText = 'width:900px;overflow:visible'
    await Plotly.newPlot(el, fig.data, fig.layout, {displayModeBar: false})
    const box = el.querySelector('.main-svg').getBoundingClientRect()
    const texts = [...el.querySelectorAll('svg text')].filter(t => t.textContent.trim() && t.getBoundingClientRect().width && !t.closest('.hoverlayer'))
      .map(t => ({t, r: t.getBoundingClientRect(), said: t.textContent, ink: getComputedStyle(t).fill, cell: !!t.closest('.textpoint')}))
    for (const {r, said} of texts)
      if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1) say(`'${said}' is cut by the border`)
    const apart = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) < 1.5 || Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) < 1.5
    texts.forEach((a, i) => texts.slice(i + 1).forEach(b => { if (!apart(a.r, b.r)) say(`'${a.said}' overlaps '${b.said}'`) }))
    const l = el._fullLayout, heat = fig.data.find(d => d.type === 'heatmap'), size = a => a._length / Math.abs(a.range[1] - a.range[0])
    if (heat && Math.abs(size(l.xaxis) - size(l.yaxis)) > .5) say(`cells of ${size(l.xaxis)} × ${size(l.yaxis)}`)
    if (el.querySelector('.legend .scrollbar') && +el.querySelector('.legend .scrollbar').getAttribute('height') > 0) say('the legend is cut')
    if (!heat && l.yaxis && l.yaxis._length < 60 && fig.data.length) say(`a strip of ${l.yaxis._length} pixels`)
    for (const t of texts.filter(t => !t.cell)) if (ratio(t.ink, l.paper_bgcolor.startsWith('#') ? 'rgb(255,255,255)' : l.paper_bgcolor) < 4.5) say(`'${t.said}' is faint: ${t.ink}`)
    const image = el.querySelector('.heatmaplayer image'), cells = texts.filter(t => t.cell)
    if (!image || !cells.length) continue
    const from = image.getBoundingClientRect(), canvas = document.createElement('canvas'), picture = new Image()
    picture.src = image.getAttribute('href') || image.getAttribute('xlink:href')
    await picture.decode()
    canvas.width = picture.width; canvas.height = picture.height
    const c = canvas.getContext('2d', {willReadFrequently: true})
    c.drawImage(picture, 0, 0)
    for (const {r, ink, said} of cells) {
      const at = [(r.left - 1 - from.left) * picture.width / from.width, (r.top + r.height / 2 - from.top) * picture.height / from.height]
      const under = [...c.getImageData(...at, 1, 1).data]
      if (under[3] && ratio(ink, `rgb(${under})`) < 4.5) say(`'${said}' is faint in its cell`)
    }
  }
  return out }"""

@pytest.fixture(scope="module")
def page(chromium, tmp_path_factory):  # noqa: F811
    "An empty page that can draw."
    from plotly.offline import get_plotlyjs
    file = tmp_path_factory.mktemp("page")/"page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><link rel=icon href='data:,'><body style='margin:0'><script>{get_plotlyjs()}</script>", encoding="utf-8")
    with watched(chromium, file.as_uri()) as page:
        page.goto(file.as_uri())
        yield page

@pytest.mark.parametrize("zoo", ZOOS)
def test_any_zoo_fits(page, zoo):
    drawn = {f"{zoo}-{k}": json.loads(f.to_json()) for k, f in figures(*ZOOS[zoo]).items()}
    found = page.evaluate(MEASURE, drawn)
    assert not found, "\n".join(found)

@pytest.fixture(scope="module")
def graded_run(tmp_path_factory):
    "A run in which one task has graded scores."
    from model_glue_nb.benchmarking.intervals import ItemScores, mean_interval, oracle_question, oracle_task, paired_gain
    from model_glue_nb.reporting.example_run import invented_run, invented_tables
    from model_glue_nb.reporting.run_tables import Answers
    run, t = invented_run(tmp_path_factory.mktemp("run")/"run"), invented_tables()
    graded = t["items"].task == "shift"
    t["items"].loc[graded, "value"] *= np.random.default_rng(0).integers(1, 9, graded.sum()) / 8
    answers, c = Answers(t["items"]), t["comparison"]
    singles = {m: answers.of(m) for m in t["scores"].model.unique()}
    bounds = dict(oracle_task=oracle_task(singles), oracle_question=oracle_question(singles))
    systems = {s: bounds[s] if s in bounds else answers.of(m) for s, m in zip(c.system, c.model)}
    def shown(tasks):
        "Mean and gain of every system, as the page writes them."
        out = []
        for items in systems.values():
            own, best = (ItemScores({k: x[k] for k in tasks}) for x in (items, systems["best_single"]))
            m, g = mean_interval(own), paired_gain(own, best)
            out.append((f"{100 * m.mean:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]", f"{100 * g.mean:+.1f} [{100 * g.low:+.1f}, {100 * g.high:+.1f}]"))
        return out
    for i, items in enumerate(systems.values()):
        m, g = mean_interval(items), paired_gain(items, systems["best_single"])
        c.loc[i, ["mean", "low", "high", "gain", "gain_low", "gain_high"]] = m.mean, m.low, m.high, g.mean, g.low, g.high
        c.loc[i, list(items)] = [v.mean() for v in items.values()]
    c.loc[2, "ms_per_question"] = math.nan
    run.write_table("comparison", c)
    run.write_table("items", t["items"])
    return run, shown

CELLS = "() => [...document.querySelectorAll('#table tbody tr')].map(r => [...r.cells].slice(1, 3).map(c => c.innerText.trim()))"

def test_the_report_can_be_asked(chromium, graded_run, tmp_path):  # noqa: F811
    from model_glue_nb.reporting.dashboard import write_report
    run, shown = graded_run
    file = write_report(run).absolute()
    assert file.stat().st_size < 3e6
    with watched(chromium, file.as_uri(), accept_downloads=True) as page:
        page.goto(file.as_uri())
        page.wait_for_function("() => document.documentElement.dataset.ready")
        tasks, boxes = run.read_table("comparison").columns[12:], page.locator("#table fieldset input")
        assert boxes.count() == len(tasks) == 5
        for off in [(), (0,), (4,), (0, 1, 2, 3), (1, 4)]: # with and without the graded task
            for i in sorted(range(5), key=off.__contains__): boxes.nth(i).set_checked(i not in off) # never none
            for seen, (mean, gain), r in zip(page.evaluate(CELLS), shown([t for i, t in enumerate(tasks) if i not in off]), range(99)):
                assert seen[0] == mean, (off, r)
                assert seen[1] == (gain if r else "–"), (off, r)
        bars = page.evaluate("() => document.querySelector('#comparison .plot').data[0].x")
        assert [f"{x:.1f}" for x in bars] == [m.split()[0] for m, _ in shown([tasks[0], *tasks[2:4]])]
        assert "3 of 5 tasks" in page.locator("#table .said").inner_text()
        for i in range(4): boxes.nth(i).click() if boxes.nth(i).is_checked() else None
        assert page.evaluate("() => [...document.querySelectorAll('#table input')].filter(b => b.checked).length") == 1, "one task stays"
        for i in range(5): boxes.nth(i).set_checked(True)

        head = page.locator("#table th button")
        def column(j): return page.evaluate("j => [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[j].innerText.trim())", j)
        head.nth(1).click()
        means = [float(x.split()[0]) for x in column(1)]
        assert means == sorted(means) and page.locator("#table th").nth(1).get_attribute("aria-sort") == "ascending"
        head.nth(1).click()
        assert [float(x.split()[0]) for x in column(1)] == sorted(means, reverse=True)
        for _ in range(2):
            head.nth(5).click()
            assert column(5)[-3:] == ["–"] * 3, "what is missing comes last either way"
        head.nth(3).click() # 500 k stand before 1.5 M
        assert column(3)[0] == "500 k" and column(3)[-1] == "5.5 M"
        boxes.nth(0).set_checked(False) # rows that have moved get their own numbers
        head.nth(1).click()
        assert sorted(map(tuple, page.evaluate(CELLS))) == sorted((m, g if s else "–") for (m, g), s in zip(shown(tasks[1:]), range(99)))

        with page.expect_download() as saved: page.locator("#table .tools button", has_text="CSV").click()
        saved.value.save_as(tmp_path/"table.csv")
        table = pd.read_csv(tmp_path/"table.csv")
        assert len(table) == 8 and [c for c in table if c.startswith("mean")][1].endswith("low") and table.shape[1] == 6 + 4 + 5
        with page.expect_download() as saved: page.locator("#scores .tools button", has_text="SVG").click()
        saved.value.save_as(tmp_path/"scores.svg")
        assert (tmp_path/"scores.svg").read_text().startswith("<svg") and saved.value.suggested_filename == "scores.svg"

        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
        wide = page.evaluate("() => [...document.querySelectorAll('.plot')].map(p => p.querySelector('.main-svg').getBoundingClientRect().width)")
        assert wide and max(wide) <= 690, "wider than paper"
        assert not page.locator("nav").is_visible() and not page.locator(".tools").first.is_visible()
        ink = page.evaluate("() => getComputedStyle(document.querySelector('#scores .ytick text')).fill")
        assert ink == "rgb(86, 96, 107)", "the ink of a dark page on white paper"
