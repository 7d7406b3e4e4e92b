"""Options of the Hugging Face Trainer and its examples, and their equivalents here."""

OURS = {
    "fp16": "train.mixed_precision fp16",
    "bf16": "train.mixed_precision bf16",
    "warmup_ratio": "optim.warmup_fraction",
    "group_by_length": "data.num_buckets (batches are always grouped by length)",
    "report_to": "nothing: log.jsonl is always written, TensorBoard too where it is installed",
    "train_split_name": "data.train_splits",
    "eval_split_name": "data.eval_splits",
    "text_column_name": "data.text_column",
    "audio_column_name": "nothing: the column is `audio` in parquet and hf:, `path` in a manifest",
    "dataset_name": "data.source hf:NAME",
    "dataset_config_name": "data.source hf:NAME:CONFIG",
    "model_name_or_path": "model.pretrained",
    "tokenizer_name_or_path": "text.vocabulary",
    "cache_dir": "nothing: set HF_HOME to move the hub's cache",
    **dict.fromkeys(("token", "use_auth_token"), "nothing: `hf auth login`, or set HF_TOKEN"),
    "trust_remote_code": "nothing: code from a model or a dataset is never run",
    "eval_metrics": "nothing: loss, word and character error rate are always reported",
    "length_column_name": "nothing: lengths come from the audio",
    "ctc_zero_infinity": "nothing: clips without an alignment are left out and listed",
    **dict.fromkeys(("no_cuda", "use_cpu"), "nothing: set JAX_PLATFORMS=cpu"),
    "freeze_feature_extractor": "model.freeze_feature_encoder",
    "max_duration_in_seconds": "data.max_seconds",
    "min_duration_in_seconds": "data.min_seconds",
    "max_train_samples": "data.max_train_clips",
    "max_eval_samples": "data.max_eval_clips",
    "preprocessing_num_workers": "data.num_workers",
    "dataloader_num_workers": "data.num_workers",
    "chars_to_ignore": "text.normalization",
    "preprocessing_only": "the command `flax-asr prepare`",
    "do_train": "the command `flax-asr train`",
    "do_eval": "nothing: training scores by itself; `flax-asr evaluate` scores a finished model",
    "do_predict": "nothing: training scores by itself; `flax-asr evaluate` scores a finished model",
    "load_best_model_at_end": "nothing: the best checkpoint is the one tested and exported",
    "greater_is_better": "nothing: a lower train.metric_for_best_model is always better",
    "optim": "nothing: the optimiser is AdamW",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id"),
        "nothing: upload the run's folder export/ with `hf upload`",
    ),
    **dict.fromkeys(("deepspeed", "fsdp"), "train.zero_sharding"),
    "logging_dir": "nothing: log.jsonl and tensorboard/ are in output_dir",
    "run_name": "output_dir",
    "overwrite_output_dir": "the option --restart of `flax-asr train`",
    "resume_from_checkpoint": "nothing: the same command resumes by itself",
    "evaluation_strategy": "train.eval_steps",
    "eval_strategy": "train.eval_steps",
    "save_strategy": "train.save_steps",
    "logging_strategy": "train.logging_steps",
    "train_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.global_batch_size",
    "lr": "optim.learning_rate",
    **{
        name: f"model.config: {{{name}: VALUE}}"
        for name in (
            "mask_time_prob mask_time_length mask_feature_prob mask_feature_length layerdrop"
            " attention_dropout hidden_dropout activation_dropout feat_proj_dropout"
            " final_dropout ctc_loss_reduction"
        ).split()
    },
}
"""Trainer option -> our option, or why there is none; names that are the same are not listed."""
