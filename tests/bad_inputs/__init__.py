"""Bad inputs: what a user can get wrong, and that each mistake is told in one sentence before anything is lost.

The table stands in the ENTRIES of the modules beside this one (config, yaml_files, sizes, data, indexed, tokenizer,
checkpoint, outputs, environment, generation, traces, optimizer, rewards, runs), one `Bad` per mistake; `bench.py` says
what an entry may spoil. To add a mistake, add an entry where its neighbours stand.
"""
