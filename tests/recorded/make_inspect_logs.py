"""Writes the Inspect logs of tests/recorded/logs: python tests/recorded/make_inspect_logs.py tests/recorded/logs

Needs inspect_ai (0.3.285 wrote the files that are there). Its mock model answers; nothing is fetched.
"""
import sys, tempfile
from pathlib import Path
from inspect_ai import Task, eval, task
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log, write_eval_log
from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, accuracy, exact, match, scorer, stderr

CAPITALS = dict(France="Paris", Japan="Tokyo", Peru="Lima", Kenya="Nairobi", Norway="Oslo", Egypt="Cairo")
SUMS = [(2, 3), (4, 4), (1, 6), (5, 5)]

@scorer(metrics=[accuracy(), stderr()])
def closeness():
    "A graded score: the share of the target's letters that the answer begins with."
    async def score(state, target):
        said, wanted = state.output.completion, target.text
        same = next((i for i, (a, b) in enumerate(zip(said, wanted)) if a != b), min(len(said), len(wanted)))
        return Score(value=same / len(wanted), answer=said)
    return score

@task
def capitals():
    samples = [Sample(id=land, input=f"What is the capital of {land}?", target=town) for land, town in CAPITALS.items()]
    return Task(dataset=samples, scorer=[match(), closeness()])

@task
def sums():
    return Task(dataset=[Sample(input=f"{a} + {b} = ?", target=str(a + b)) for a, b in SUMS], scorer=exact())

def said(text):
    choice = ChatCompletionChoice(message=ChatMessageAssistant(content=text))
    return ModelOutput(model="mockllm/model", choices=[choice], usage=ModelUsage(input_tokens=8, output_tokens=1, total_tokens=9))

def write(model, form, answers, folder, epochs=1):
    with tempfile.TemporaryDirectory() as tmp:
        for make, texts in zip((capitals, sums), answers):
            live = get_model(f"mockllm/{model}", custom_outputs=[said(t) for t in texts], memoize=False)
            log = eval(make(), model=live, log_dir=tmp, log_format=form, max_samples=1, max_connections=1, epochs=epochs, display="none")[0]
            log = read_eval_log(log.location)
            for s in log.samples: s.events, s.timelines = [], None # the story of each answer: most of the file, and not needed
            log.eval.model_args = {}
            log.eval.task_file = Path(__file__).name
            (folder/model).mkdir(parents=True, exist_ok=True)
            write_eval_log(log, str(folder/model/f"{log.eval.task}.{form}"), format=form)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write("alpha", "eval", (["Paris", "Tokyo", "Lima", "Nairob", "Oslo", "Alexandria"], ["5", "8", "7", "11"]), folder)
    write("beta", "json", (["Paris", "Kyoto", "Cusco", "Nairobi", "Bergen", "Cairo"], ["5", "9", "7", "10"]), folder)
    write("gamma", "eval", (["Paris", "Tokyo", "Lima", "Rome", "Bonn"] * 3, ["5", "8", "x"] * 3), folder, epochs=2)
