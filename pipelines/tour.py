# %% [markdown]
"""A tour as a notebook: a feature store, its clips, a trained model, and one prediction explained.

Run the README's commands first: they make out/store and out/clcr. Editors open this file cell by cell, and
`jupytext --to ipynb pipelines/tour.py` makes a notebook of it.
"""

# %% A feature store is tar files with features, and an index with a row for each clip.
import matplotlib.pyplot as plt
import pandas as pd
import torch

import clcr
from clcr.batches import collate
from features.store import Store
from features.store.sheet import contact_sheet
from pipelines.evaluation.strips import alpha_strips

store = Store("out/store")
index = store.index("test").to_pandas()
print(f"{len(index)} test clips, with {', '.join(store.spec.features)}")
print(index.head())

# %% Some clips: frames over log-mel.
contact_sheet(store, clips=2, seed=0, split="test").savefig("out/tour-clips.png")

# %% A model answers samples; a class comes with its probability.
model = clcr.load("out/clcr/model")
samples = list(store.samples("test"))
answers = pd.DataFrame(model.predict(samples))
print(answers.head())

# %% One prediction: which level and which modality it is read from, for each task.
assert isinstance(model, clcr.CLCR), "of all models only this one has levels and a budget"
with torch.no_grad():
    out = model(collate(samples[:1], model.features, model.tasks))
for task, omega in out.task_omega.items():
    print(task, "reads the levels, from shallow to deep, with", [round(float(weight), 2) for weight in omega[0]])
print({name: round(float(weight), 2) for name, weight in zip(model.features, out.beta[0], strict=True)})

# %% And which tokens its exchange lets through, under the clip's frames and log-mel.
contact_sheet(store, 1, 0, "test", alpha_strips(model)).savefig("out/tour-exchange.png")
plt.close("all")
