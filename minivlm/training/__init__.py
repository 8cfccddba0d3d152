"""Fine-tuning: from a file of conversations to an adapter that PEFT reads. In the order of the data:

    rows.py        lines of a file → conversations
    data.py        conversations → batches with labels; every row is checked before step 1
    loss.py        a model and a batch → minus the summed log-probability of learned tokens, and their number
    order.py       the number of a step → its rows
    optimisation.py, adamw.py      gradients of a whole step → new weights
    loop.py        all of these, a step at a time; recipe.py: its settings; folder.py: its log, state and result

What is trained: targets.py (names and settings, as PEFT's), lora.py (low-rank layers), adapters.py (PEFT's folders),
tied.py (shared tables). What it costs: lean.py and memory.py. On several devices: fsdp.py.
"""
