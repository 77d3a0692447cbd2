"""Flags of the paper's own code that are not settings here, and what stands in their place."""

TINY = "a run of a minute is that of config/{}/tiny.py"
BOTH = {
    "split_qkv": "queries, keys and values are always layers of their own",
    "manual_disable_flash_att": "--attention_backend chooses the kernel of MLR and window attention",
    "opt_name": "the optimizer is AdamW",
}
LANGUAGE_MODEL = BOTH | {
    "debug": TINY.format("struct_configs"),
    "data_dtype": "the dataset's meta.json says it",
    "use_swa_with_for_loop": "--attention_backend chooses the kernel: flex, blockwise or dense",
}
IN_CONTEXT = BOTH | {
    "debug": TINY.format("icl_configs"),
    "test_run": TINY.format("icl_configs"),
    "vocab_size": "prompts are numbers, not tokens",
    "btt_tt_dim": "BTT is cut as the paper's is; --mlbtc_levels gives bilinear_MLBTC any other cut",
    "training_task_kwargs": "the task's own settings are --task_sparsity, --task_hidden, --task_depth and --noise_std",
    "training_num_tasks": "--training_num_training_examples is the size of the pool, each prompt with its own task",
    "training_data": "x is Gaussian; evaluate_ICL.py tests other distributions",
    "training_save_every_steps": "--eval_interval: a checkpoint follows every evaluation",
    "training_keep_every_steps": "one checkpoint is kept, the last; --eval_interval says how often it is written",
    "training_resume_id": "--init_from=resume resumes the run in --out_dir",
    "evaluation_samples_multiplier": "--eval_prompts is the number of prompts in an evaluation",
    "wandb_notes": "--wandb_run_name is what W&B is told of a run",
}
