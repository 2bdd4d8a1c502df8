"""What people call our keys elsewhere: in transformers, TRL, Axolotl, LLaMA-Factory, unsloth, litgpt, nanoGPT,
torchtune."""

import difflib
from collections.abc import Callable, Collection, Iterable

# Our key, and the names that others give it.
_NAMES = {
    "train.lr": "learning_rate lr peak_lr max_lr base_lr",
    "train.max_steps": "steps num_steps total_steps train_steps max_train_steps max_iters iterations num_iterations",
    "train.epochs": "num_train_epochs num_epochs max_epochs n_epochs epoch",
    "train.micro_batch_size": "batch_size per_device_train_batch_size per_device_batch_size train_batch_size "
    "per_gpu_train_batch_size per_device_eval_batch_size eval_batch_size device_batch_size mbs micro_batch",
    "train.grad_accumulation": "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches "
    "grad_accumulation_steps accumulation_steps global_batch_size total_batch_size",
    "train.weight_decay": "wd decay l2",
    "train.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps",
    "train.warmup_ratio": "warmup_fraction warmup_proportion",
    "train.lr_schedule": "lr_scheduler_type lr_scheduler scheduler schedule lr_decay",
    "train.min_lr_ratio": "min_lr lr_min cosine_min_lr_ratio min_learning_rate",
    "train.clip_grad_norm": "max_grad_norm grad_clip gradient_clip_val clip_norm gradient_clipping max_norm",
    "train.optimizer": "optim optimizer_type optimizer_name",
    "train.optimizer_options": "optim_args optimizer_args optim_kwargs optimizer_kwargs",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "train.eps": "adam_epsilon adam_eps epsilon",
    "train.activation_checkpointing": "gradient_checkpointing grad_checkpointing use_gradient_checkpointing "
    "activation_offloading",
    "train.eval_every": "eval_steps eval_interval eval_freq evaluation_strategy eval_strategy val_every "
    "val_check_interval evals_per_epoch evaluate_every",
    "train.eval_batches": "eval_iters max_eval_samples limit_val_batches",
    "train.save_every": "save_steps save_interval save_freq save_strategy checkpoint_every checkpoint_interval "
    "saves_per_epoch",
    "train.keep_last": "save_total_limit keep_checkpoints",
    "train.keep_best": "load_best_model_at_end save_best",
    "train.early_stopping": "early_stopping_patience patience",
    "data.sequence_length": "max_length max_seq_length max_seq_len seq_length seq_len sequence_len block_size "
    "cutoff_len context_length model_max_length max_sequence_length ctx_len",
    "data.train": "dataset datasets dataset_name train_file train_data data_path dataset_path train_dataset data_dir "
    "dataset_dir data_files training_data json_path interleave_probs mix_strategy data_mix data_mixture",
    "data.valid": "validation_file eval_dataset eval_file val_data valid_data validation test_datasets eval_data val",
    "data.valid_fraction": "val_set_size val_size eval_split validation_split_percentage val_fraction "
    "val_split_fraction",
    "data.text_key": "dataset_text_field text_column text_field text_column_name",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_config",
    "data.max_tokens": "max_samples max_train_samples num_tokens token_budget",
    "data.task": "task_type type_of_task stage",
    "data.document_attention": "packing sample_packing pack_sequences",
    "data.cache_dir": "dataset_prepared_path",
    "model.path": "model_name_or_path model_name base_model pretrained_model_name_or_path model_path pretrained "
    "hub_id checkpoint_path checkpoint_dir",
    "model.config": "config_name model_config architecture model_type",
    "model.overrides": "config_overrides model_args overrides_of_model_config rope_scaling rope_parameters",
    "model.grow_vocabulary": "resize_vocab resize_token_embeddings resize_embeddings",
    "data.added_tokens": "tokens add_tokens add_special_tokens additional_special_tokens extra_special_tokens",
    "train.restart_schedule": "reset_lr_scheduler reset_scheduler reset_dataloader ignore_data_skip restart_lr",
    "model.dtype": "bf16 fp16 tf32 torch_dtype precision mixed_precision pure_bf16",
    "model.compile": "torch_compile compile_model",
    "model.attention": "attn_implementation attn_impl flash_attention flash_attn sdp_attention",
    "model.elementwise": "use_liger use_liger_kernel liger_kernel liger fused_kernels",
    "run.dir": "output_dir logging_dir save_dir out_dir results_dir",
    "run.name": "run_name experiment_name wandb_run_name exp_name project_name",
    "run.seed": "random_state random_seed data_seed manual_seed",
    "run.deterministic": "full_determinism use_deterministic_algorithms",
    "tracking": "report_to logger_name use_wandb use_tensorboard loggers log_with wandb_project",
    "device": "device_map no_cuda use_cpu accelerator",
    "parallel": "fsdp deepspeed fsdp_config strategy hsdp dp_replicate dp_shard data_parallel_replicate_degree "
    "data_parallel_shard_degree sharding_strategy device_mesh mesh",
    "method": "full_finetuning adapter finetuning_type peft peft_type algorithm use_galore use_lora galore",
    "lowrank.rank": "lora_r r lora_rank galore_rank low_rank",
    "lowrank.alpha": "lora_alpha",
    "lowrank.scale": "galore_scale scaling",
    "lowrank.include": "target_modules lora_target optim_target_modules galore_target lora_target_modules",
    "lowrank.exclude": "modules_to_save lora_modules_to_save skip_modules",
    "lowrank.update_proj_gap": "galore_update_interval subspace_update_interval update_freq T "
    "subspace_update_freq galore_update_proj_gap",
    "lowrank.weight_format": "load_in_8bit load_in_4bit quantization bits quantization_config",
    "memory.budget": "max_memory gpu_memory memory_limit",
    "export.formats": "export_format output_format save_safetensors",
    "sample.max_new_tokens": "num_tokens_to_sample",
}  # fmt: skip
_OTHERS = {name.lower(): ours for ours, names in _NAMES.items() for name in names.split()}

# Where a value must be said in other words too.
_NOTES = {
    "per_device_eval_batch_size": "Evaluation takes micro-batches of the same size.",
    "min_lr": "It is a share of train.lr.",
    "fp16": "It is float32 or bfloat16; float16 is not used here.",
    "global_batch_size": "It counts the micro-batches of a step.",
}
_NOTES["max_samples"] = _NOTES["max_train_samples"] = "It counts tokens, not samples."
_NOTES["datasets"] = "Several are a list such as [{path: a.jsonl, weight: 2}, {path: b.jsonl}]."
_NOTES["interleave_probs"] = _NOTES["mix_strategy"] = "Sources in its list are mixed by their weight."
_NOTES["test_datasets"] = "Several are a mapping of names to files, such as {stories: a.jsonl, code: b.jsonl}."
_NOTES["checkpoint_dir"] = "The folder that a run writes to is run.dir."
_NOTES["rope_scaling"] = "For example model.overrides.rope_scaling={rope_type: yarn, factor: 4}."
_NOTES["ignore_data_skip"] = "A new run then begins on the checkpoint of another one."
_NOTES["lr_warmup_steps"] = "It counts optimizer steps, not iterations."
_NOTES["wandb_project"] = "It names packages, and the environment's WANDB_PROJECT names the project."
_NOTES["full_finetuning"] = "Every method but lora trains all weights."

_ANSWERS = "data.task=instruct learns answers alone, and data.task=text learns all of a text"
_PUSH = "a run uploads nothing, and qgalore export RUN --format hf --out DIR --push REPO uploads an export"
# What has no key here, and why.
_NONE = {
    "logging_steps": "every step is logged",
    "log_interval": "every step is logged",
    "logging_strategy": "every step is logged",
    "resume_from_checkpoint": "say --resume auto or --resume PATH on the command line",
    "lora_dropout": "LoRA's factors have no dropout here",
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_strategy": _PUSH,
    "hub_token": "tokens belong into the environment, as HF_TOKEN, or to hf auth login",
    "wandb_api_key": "tokens belong into the environment, as WANDB_API_KEY, or to wandb login",
    "trust_remote_code": "code from a model's folder is never run",
    "dataloader_num_workers": "tokens are read from a cache, which needs no workers",
    "num_workers": "tokens are read from a cache, which needs no workers",
    "chat_template": "conversations are written with the tokenizer's own template",
    "template": "conversations are written with the tokenizer's own template",
    "train_on_inputs": _ANSWERS,
    "train_on_prompt": _ANSWERS,
    "mask_prompt": _ANSWERS,
    "completion_only_loss": _ANSWERS,
    "assistant_only_loss": _ANSWERS,
    "mask_history": "every answer is learned but those with a weight of 0",
    "devices": "torchrun --nproc_per_node N starts a process for each card",
    "num_processes": "torchrun --nproc_per_node N starts a process for each card",
    "group_by_length": "rows are filled with several documents",
    "pad_to_sequence_len": "rows are filled with several documents",
    "dataset_num_proc": "the tokenizer's own threads are used",
    "preprocessing_num_workers": "the tokenizer's own threads are used",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "special_tokens": "roles such as eos are those of the tokenizer, and data.added_tokens adds entries",
    "overwrite_cache": "the cache knows by the data's content when to tokenize anew",
}

# Keys of one source in others' lists of data.
_IN_SOURCES = {
    "path": "file_name file dataset data_files name json_path hf_hub_url",
    "weight": "probability prob probs ratio mixing_ratio sampling_weight share",
    "text_key": "field text_column dataset_text_field text_field column",
}
_OF_SOURCES = {name: ours for ours, names in _IN_SOURCES.items() for name in names.split()}
_LAYOUT = "the keys of a row tell its layout, and task says what is learned"
_NONE_IN_SOURCES = {
    "type": _LAYOUT,
    "ds_type": _LAYOUT,
    "format": _LAYOUT,
    "formatting": _LAYOUT,
    "split": "of a hub dataset the split train is read",
}


def hint_in_source(location: tuple[str, ...], known: Collection[str]) -> str:
    """As :func:`hint`, of a source of data, whose keys are ``known``."""
    plain = _plain(location)
    if plain in _NONE_IN_SOURCES:
        return f"There is no such key, since {_NONE_IN_SOURCES[plain]}."
    meant = _OF_SOURCES.get(plain, plain)
    near = [meant] if meant in known else difflib.get_close_matches(plain, known, n=1)
    return f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"


def _plain(location: tuple[str, ...]) -> str:
    return str(location[-1])[:80].lower().replace("-", "_")


def hint(location: tuple[str, ...], siblings: Iterable[str], all_keys: Callable[[], Iterable[str]]) -> str:
    """What to say of an unknown key: which one is meant, by meaning first and then by spelling, or why there is none.
    ``siblings`` are the names known in its section, ``all_keys()`` gives the dotted names of all keys."""
    section, name, known = location[:-1], str(location[-1])[:80], list(siblings)
    plain = _plain(location)
    if plain in _NONE:
        return f"There is no such key, since {_NONE[plain]}."
    everywhere = list(all_keys())
    same = [full for full in everywhere if full.rsplit(".", 1)[-1] == plain]
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.85) or difflib.get_close_matches(name, known, n=1)
    spelled = ".".join([*section, near[0]]) if near else None
    close = spelled is not None and difflib.SequenceMatcher(None, plain, near[0]).ratio() > 0.85
    if plain in _OTHERS and not close:
        return f"did you mean {_OTHERS[plain]}? {_NOTES.get(plain, '')}".strip()
    meant = spelled if close else (same or [spelled])[0]
    if meant is None:
        last = {full.rsplit(".", 1)[-1]: full for full in everywhere}
        meant = next((last[word] for word in difflib.get_close_matches(plain, last, n=1, cutoff=0.75)), None)
    return f"did you mean {meant}?" if meant else f"known here: {', '.join(known)}"
