# %% [markdown]
# # From texts to a distilled student, in less than a minute
#
# This file is a script and, cell by cell (`# %%`), a notebook: VS Code, Spyder and jupytext open it as one. It makes
# its own texts and its own small teacher, so it needs no download. `python docs/tutorial.py [DIRECTORY]` runs all of
# it; the files stay in the directory (without one, in a new one of the system's). docs/tutorial.md goes with it.

# %%
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small lose time to a second thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub

folder = Path(sys.argv[1] if __name__ == "__main__" and len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tutorial-"))
folder.mkdir(parents=True, exist_ok=True)
print(f"all files go to {folder}")

# %% [markdown]
# ## 1. Texts
# JSON lines, one document a line. These are stories of one sentence pattern each, with a hero who keeps the name.

# %%
choose = random.Random(0).choice
NAMES, PLACES = "Anna Bela Carl Dora Emil Fred Gita Hugo".split(), "house river forest garden market school".split()
THINGS, FEELINGS = "ball boat cake coat drum kite lamp ring".split(), "happy sad tired proud afraid hungry".split()


def story() -> str:
    name, thing, place = choose(NAMES), choose(THINGS), choose(PLACES)
    sentences = [f"{name} had a {choose(['red', 'blue', 'small', 'new'])} {thing}."]
    sentences += [f"{name} took the {thing} to the {place}.", f"At the {choose(PLACES)} {name} met {choose(NAMES)}."]
    sentences += [f"{name} was {choose(FEELINGS)} and {choose(FEELINGS)}."] * choose([0, 1])
    return " ".join([*sentences, f"In the end {name} {choose(['lost', 'kept', 'sold'])} the {thing}."])


texts = [story() for _ in range(800)]
(folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
print(f"{len(texts)} texts, the first: {texts[0]}")

# %% [markdown]
# ## 2. A teacher
# Any causal language model of transformers: a name on the hub, or a directory. This one is trained here, on the same
# kind of texts, in a few seconds.

# %%
from accel_distill.demo_teacher import train_teacher, train_tokenizer  # noqa: E402

others = [story() for _ in range(1500)]
tokenizer = train_tokenizer(others)
train_teacher(others, tokenizer, path=folder / "teacher", steps=100, block=64)

# %% [markdown]
# ## 3. A run file
# One file says everything: teacher, dataset, targets, cache, student, loss, training. `accel-distill init` prints one
# with every key. `check` says whether it is right, without loading a model.

# %%
from accel_distill.cli import main as accel_distill  # noqa: E402

run_file = folder / "run.yaml"
run_file.write_text(
    f"""
teacher:
  model: {folder}/teacher
dataset:
  name: json
  data_files: {folder}/texts.jsonl
  max_length: 64
  eval_samples: 100
targets:
  threshold: 0.03
cache:
  path: {folder}/cache
  samples_per_shard: 200
  min_free_disk: 100MB
student:
  config: {{model_type: llama, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 1, num_attention_heads: 2}}
training:
  output_dir: {folder}/student
  num_train_epochs: 2
  per_device_train_batch_size: 16
  learning_rate: 1e-2
  logging_steps: 20
  save_strategy: "no"
"""
)
assert accel_distill(["check", "--config", str(run_file)]) == 0

# %% [markdown]
# ## 4. The cache
# The teacher runs once. On several processes: `launch/generate.sh 2 --config run.yaml`; here, in this one. The same
# call again goes on where the last one stopped, and finds that all is there.

# %%
from accel_distill.config import load_config  # noqa: E402
from accel_distill.generate import generate  # noqa: E402

config = load_config(run_file)
manifest = generate(config)
assert generate(config) == manifest

# %% [markdown]
# ## 5. What is in it
# `inspect` for people (`--json` for programs), `TeacherCache` for code. A position's target is sparse; its weights sum
# to exactly 1, and their mean over many draws is the teacher's distribution.

# %%
from accel_distill import TeacherCache  # noqa: E402

assert accel_distill(["inspect", str(folder / "cache")]) == 0
cache = TeacherCache(folder / "cache")
sample = cache[0]
dense = sample.targets.to_dense(cache.vocab_size)  # (positions, vocab_size)
where = 1 + int(dense[1:].max(dim=1).values.argmin())  # where the teacher is least sure, after the first word
print("after", repr(tokenizer.decode(sample.input_ids[: where + 1], skip_special_tokens=True)), "the teacher says:")
for weight, token in zip(*dense[where].topk(4), strict=True):
    print(f"  {float(weight):.3f}  {tokenizer.decode(int(token))!r}")

# %% [markdown]
# ## 6. Two students
# The first learns from the cache, and the teacher is not needed any more. The second, to compare with, learns from the
# text alone: same model, seed, steps, order. An override replaces any value of the run file.

# %%
from accel_distill.train import train  # noqa: E402

distilled = train(config)
text_alone = ["loss.kd_weight=0", "loss.ce_weight=1", f"training.output_dir={folder}/baseline"]
alone = train(load_config(run_file, text_alone))

# %% [markdown]
# ## 7. Did it work?
# On the first 100 texts, which no student has seen.

# %%
print(f"{'held out':28}{'distilled':>12}{'text alone':>12}{'teacher':>12}")
for title, key in (("cross-entropy, nats", "eval_ce"), ("KL(teacher || student)", "eval_kl")):
    teacher = f"{distilled['eval_teacher_ce']:.4f}" if key == "eval_ce" else ""
    print(f"{title:28}{distilled[key]:12.4f}{alone[key]:12.4f}{teacher:>12}")
print(f"{'top-1 agreement':28}{distilled['eval_top1_agreement']:12.1%}{alone['eval_top1_agreement']:12.1%}")

# %% [markdown]
# ## 8. The student is a model like any other

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

student = AutoModelForCausalLM.from_pretrained(folder / "student")
words = AutoTokenizer.from_pretrained(folder / "student")
prompt = words("Anna had a", return_tensors="pt")
written = student.generate(**prompt, max_new_tokens=30, do_sample=False, pad_token_id=words.pad_token_id)
print(words.decode(written[0], skip_special_tokens=True))
