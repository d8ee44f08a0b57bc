//! Everything that the eight steps name: `use qlora_nb::prelude::*;`

pub use candle_core::{self, DType, Device, Tensor};

pub use crate::{
    batch::Batch,
    collator::DataCollatorForSeq2Seq,
    dataset::{Dataset, DatasetDict, Example, Value},
    display::{BarChart, Plot},
    error::{Error, Result},
    features::{Encoding, Features},
    generation::{FinishReason, GenerationConfig},
    model::{
        AutoModelForCausalLM, BitsAndBytesConfig, CausalLM, DeviceMap, Model, ModelOptions, peak_resident_bytes,
        reset_peak,
    },
    optim::{Optim, lr_scheduler::SchedulerType},
    peft::{LoraConfig, PeftModel, TargetModules, TaskType, get_peft_model},
    pipeline::{GeneratedText, TextGenerationPipeline, pipeline},
    quant::{QuantState, QuantType, dequantize_4bit, quantize_4bit},
    tokenizer::{AutoTokenizer, Message, PaddingSide, Tokenizer},
    trainer::{PassOptions, TrainOutput, Trainable, Trainer, TrainerCallback, TrainerControl, TrainerState},
    training_args::{IntervalStrategy, SamplingStrategy, SaveStrategy, TrainingArguments},
};
