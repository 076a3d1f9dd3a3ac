//! All kernels of a step, in order: embedding, layers, head. Nothing here depends on token values or lengths but the
//! grids of prefill, so a step of decode rows alone is recorded once per number of rows and replayed.

use plimsoll_kernels::device::{Device, DeviceError, Pointer};
use plimsoll_kernels::half::bf16;
use plimsoll_kernels::ops::attention::AttentionArguments;
use plimsoll_kernels::ops::gemm::{Epilogue, GemmArguments};
use plimsoll_kernels::ops::sampling::{SampleArguments, seen_stride};
use plimsoll_kernels::ops::step::{EmbedArguments, GatherArguments, Pages};

use super::answers::Answers;
use super::input::{Input, RING};
use super::kernels::Kernels;
use super::model::DeviceModel;
use super::record::Ways;
use super::shape::{MatrixShape, Shape, StepShape};
use super::slots::Slots;
use super::space::Space;

/// Products of a layer: qkv, output, gate and up, down.
pub const PRODUCTS: usize = 4;

/// While results travel from one kernel to the next, the memory is idle: the product after the next can begin.
pub const PRODUCTS_AHEAD: usize = 2;

/// What the kernels of every step share.
pub struct Forward<'a> {
    pub device: &'a Device,
    pub kernels: &'a Kernels,
    pub shape: &'a Shape,
    pub step: &'a StepShape,
    pub model: &'a DeviceModel,
    pub space: &'a Space,
    pub input: &'a Input,
    pub slots: &'a Slots,
    pub answers: &'a Answers,
    /// All layers' pages.
    pub pages: Pointer<bf16>,
    pub pages_count: usize,
    /// How many products further on the one is whose weights a product brings nearer.
    pub ahead: usize,
}

/// How many rows of which kind: the step's singles come first, then the spans of several rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    /// Rows that are alone in their sequence's step, padding included.
    pub singles: usize,
    /// Rows of all longer spans.
    pub prefill: usize,
    /// Query blocks of the longer spans, as the prefill kernel cuts them.
    pub cuts: usize,
}

impl Rows {
    pub fn all(self) -> usize {
        self.singles + self.prefill
    }
}

/// Where the head finds its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadInput {
    /// The step's rows themselves, one after the other.
    Rows(usize),
    /// `rows` rows that the input lists, from the `first` on.
    Gathered { first: usize, rows: usize },
}

impl Forward<'_> {
    /// Embedding and all layers; leaves every row's normed hidden state.
    pub fn layers(&self, rows: Rows) -> Result<(), DeviceError> {
        self.embed(rows.all())?;
        for index in 0..self.shape.layers {
            self.qkv(index, rows.all())?;
            self.attend(index, rows)?;
            self.output(index, rows.all())?;
            self.gate_up(index, rows.all())?;
            self.down(index, rows.all())?;
        }
        Ok(())
    }

    pub fn qkv(&self, index: usize, rows: usize) -> Result<(), DeviceError> {
        self.product(Epilogue::Store, PRODUCTS * index, rows, |g| {
            g.bias = self.model.layers[index].qkv_bias;
            g.features = self.shape.qkv_width() as i32;
            g.out = self.space.qkv.pointer();
            g.out_stride = self.shape.qkv_width() as i32;
        })
    }

    pub fn output(&self, index: usize, rows: usize) -> Result<(), DeviceError> {
        let layer = &self.model.layers[index];
        self.residual(PRODUCTS * index + 1, layer.output_bias, rows, |g| {
            g.input = self.space.attended.pointer();
            g.gain = layer.mlp_norm;
        })
    }

    pub fn gate_up(&self, index: usize, rows: usize) -> Result<(), DeviceError> {
        self.product(Epilogue::GateUp, PRODUCTS * index + 2, rows, |g| {
            g.bias = self.model.layers[index].gate_up_bias;
            g.features = self.shape.intermediate as i32;
            g.out = self.space.gated.pointer();
        })
    }

    pub fn down(&self, index: usize, rows: usize) -> Result<(), DeviceError> {
        let next = self.model.layers.get(index + 1);
        self.residual(PRODUCTS * index + 3, self.model.layers[index].down_bias, rows, |g| {
            g.input = self.space.gated.pointer();
            g.gain = next.map_or(self.model.final_norm, |next| next.attention_norm);
        })
    }

    /// Logits of up to `head_rows` rows, each with every tile's largest; the logits themselves only where they are read.
    pub fn head(&self, input: HeadInput, ways: Ways) -> Result<(), DeviceError> {
        let (rows, normed, squares, rows_max) = match input {
            HeadInput::Rows(rows) => (
                rows,
                self.space.normed.pointer(),
                self.space.squares.pointer(),
                self.step.rows_max(),
            ),
            HeadInput::Gathered { first, rows } => {
                self.gather(rows, first)?;
                (
                    rows,
                    self.space.head_normed.pointer(),
                    self.space.head_squares.pointer(),
                    self.step.head_rows(),
                )
            }
        };
        let matrix = self.shape.vocabulary_matrix();
        self.product(Epilogue::Logits, PRODUCTS * self.shape.layers, rows, |g| {
            g.input = normed;
            g.squares = squares;
            g.rows_max = rows_max as i32;
            g.features = self.shape.vocabulary as i32;
            g.out_stride = matrix.rows as i32;
            let read = ways != Ways::Greedy;
            g.logits = if read { self.space.logits.pointer() } else { Pointer::NULL };
            g.best = self.space.best.pointer();
        })
    }

    pub fn embed(&self, rows: usize) -> Result<(), DeviceError> {
        let matrix = self.shape.vocabulary_matrix();
        let arguments = EmbedArguments {
            rows: self.input.rows.pointer(),
            count: rows as i32,
            rows_max: self.step.rows_max() as i32,
            embedding: self.model.embedding,
            panels: matrix.panels() as i32,
            hidden: self.shape.hidden as i32,
            embeddings: self.space.embeddings_pointer(),
            last_tokens: self.slots.last_tokens.pointer(),
            gain: self.model.layers[0].attention_norm,
            residual: self.space.residual.pointer(),
            residual_stride: self.shape.hidden_stored() as i32,
            normed: self.space.normed.pointer(),
            squares: self.space.squares.pointer(),
        };
        // SAFETY: the buffers have the shapes that the struct states, and tokens were checked.
        unsafe { self.kernels.step.embed(self.device, &arguments) }
    }

    fn gather(&self, rows: usize, first: usize) -> Result<(), DeviceError> {
        let arguments = GatherArguments {
            rows: self.input.wanted_rows.pointer::<i32>().add(first),
            count: rows as i32,
            panels: self.shape.vocabulary_matrix().panels() as i32,
            normed: self.space.normed.pointer(),
            squares: self.space.squares.pointer(),
            rows_max: self.step.rows_max() as i32,
            normed_out: self.space.head_normed.pointer(),
            squares_out: self.space.head_squares.pointer(),
            rows_max_out: self.step.head_rows() as i32,
        };
        // SAFETY: the buffers have the shapes that the struct states.
        unsafe { self.kernels.step.gather(self.device, &arguments) }
    }

    /// The weights of a step's products, in the order in which it runs them.
    fn weights(&self, chain: usize) -> Option<(Pointer<bf16>, MatrixShape)> {
        let Some(layer) = self.model.layers.get(chain / PRODUCTS) else {
            let is_head = chain == PRODUCTS * self.shape.layers;
            return is_head.then(|| (self.model.head, self.shape.vocabulary_matrix()));
        };
        Some(match chain % PRODUCTS {
            0 => (layer.qkv, self.shape.qkv()),
            1 => (layer.output, self.shape.output()),
            2 => (layer.gate_up, self.shape.gate_up()),
            _ => (layer.down, self.shape.down()),
        })
    }

    /// A product of the normed residual stream: number `chain` of the step.
    fn product(
        &self,
        epilogue: Epilogue,
        chain: usize,
        rows: usize,
        fill: impl FnOnce(&mut GemmArguments),
    ) -> Result<(), DeviceError> {
        let (weights, matrix) = self.weights(chain).expect("a step has that many products");
        let mut arguments = GemmArguments {
            weights,
            input: self.space.normed.pointer(),
            rows: rows as i32,
            rows_max: self.step.rows_max() as i32,
            tiles: matrix.tiles() as i32,
            panels: matrix.panels() as i32,
            features: matrix.rows as i32,
            splits: 0,
            squares: self.space.squares.pointer(),
            square_tiles: (self.shape.hidden_stored() / 64) as i32,
            width: self.shape.hidden as f32,
            eps: self.model.norm_eps,
            bias: Pointer::NULL,
            out: Pointer::NULL,
            out_stride: 0,
            logits: Pointer::NULL,
            gain: Pointer::NULL,
            normed: Pointer::NULL,
            squares_out: Pointer::NULL,
            best: Pointer::NULL,
            partials: self.kernels.partials.pointer(),
            counters: self.kernels.counters.pointer(),
        };
        fill(&mut arguments);
        let later = self.weights(chain + self.ahead).map(|(weights, matrix)| GemmArguments {
            weights,
            tiles: matrix.tiles() as i32,
            panels: matrix.panels() as i32,
            ..arguments
        });
        self.kernels.product(self.device, epilogue, &arguments, later.as_ref())
    }

    /// A product whose result is added to the residual stream.
    fn residual(
        &self,
        chain: usize,
        bias: Pointer<bf16>,
        rows: usize,
        fill: impl FnOnce(&mut GemmArguments),
    ) -> Result<(), DeviceError> {
        self.product(Epilogue::Residual, chain, rows, |g| {
            g.bias = bias;
            g.squares = Pointer::NULL;
            g.features = self.shape.hidden as i32;
            g.out = self.space.residual.pointer();
            g.out_stride = self.shape.hidden_stored() as i32;
            g.normed = self.space.normed.pointer();
            g.squares_out = self.space.squares.pointer();
            fill(g);
        })
    }

    pub fn attend(&self, index: usize, rows: Rows) -> Result<(), DeviceError> {
        self.kernels.attend(self.device, rows, &self.attention(index))
    }

    /// What every attention kernel of a layer is told.
    pub fn attention(&self, index: usize) -> AttentionArguments {
        let page_elements = self.shape.page_elements();
        let layer = &self.model.layers[index];
        AttentionArguments {
            qkv: self.space.qkv.pointer(),
            qkv_stride: self.shape.qkv_width() as i32,
            rows_max: self.step.rows_max() as i32,
            rows: self.input.rows.pointer(),
            spans: self.input.spans.pointer(),
            pages: self.pages.add(index * self.pages_count * page_elements),
            page_stride: page_elements as i64,
            tables: self.input.tables.pointer(),
            table_stride: self.step.table_width() as i32,
            heads: self.shape.heads as i32,
            kv_heads: self.shape.kv_heads as i32,
            head_width: self.shape.head_dim as i32,
            window: self.shape.windows[index] as i32,
            scale: self.model.attention_scale,
            first_row: 0,
            row_count: 0,
            span_count: 0,
            rope: self.model.rope.pointer(),
            query_norm: layer.query_norm,
            key_norm: layer.key_norm,
            eps: self.model.norm_eps,
            out: self.space.attended.pointer(),
            splits: 1,
            stages: 0,
            // Before the first layer's attention nothing has waited for the step's input.
            settled: i32::from(index > 0),
            partials: self.kernels.attention_partials.pointer(),
            counters: self.kernels.attention_counters.pointer(),
        }
    }

    /// Draws a token for each of the step's first `rows` samples.
    pub fn sample(&self, rows: usize, ways: Ways) -> Result<(), DeviceError> {
        let arguments = self.sampling(0);
        match ways {
            Ways::Greedy => self.kernels.sampling.greedy(self.device, &arguments, rows),
            Ways::Logits | Ways::Reported => {
                self.kernels.sampling.sample(self.device, &arguments, rows)
            }
        }
    }

    /// Log-probabilities of `rows` of the prompts from `first` on; their results lie from `at` on.
    pub fn report(&self, at: usize, first: usize, rows: usize) -> Result<(), DeviceError> {
        let prompts = self.input.prompts.pointer().add(first);
        let arguments = SampleArguments { prompts, ..self.sampling(at) };
        self.kernels.sampling.prompt_logprobs(self.device, &arguments, rows)
    }

    /// Pages that are written next and must not be another's: `pairs` of from and to.
    pub fn copy_pages(&self, pairs: &[[i32; 2]]) -> Result<(), DeviceError> {
        let pages = Pages {
            pages: self.pages,
            layers: self.shape.layers,
            count: self.pages_count,
            elements: self.shape.page_elements(),
        };
        // SAFETY: these are all pages there are, and the step was checked.
        unsafe { self.kernels.step.copy_pages(self.device, &pages, pairs) }
    }

    fn sampling(&self, at: usize) -> SampleArguments {
        let matrix = self.shape.vocabulary_matrix();
        SampleArguments {
            logits: self.space.logits.pointer(),
            scratch: self.space.adjusted.pointer(),
            best: self.space.best.pointer(),
            stride: matrix.rows as i32,
            tiles: matrix.tiles() as i32,
            vocabulary: self.shape.vocabulary as i32,
            seen_stride: seen_stride(self.shape.vocabulary) as i32,
            rows: self.input.samples.pointer(),
            prompts: self.input.prompts.pointer(),
            parameters: self.input.parameters.pointer(),
            seen: self.slots.seen.pointer(),
            biases: self.slots.biases.pointer(),
            last_tokens: self.slots.last_tokens.pointer(),
            results: self.answers.pointer().add(at),
            epoch: self.input.epoch.pointer(),
            ring: RING as i32,
            results_max: self.answers.each() as i32,
        }
    }
}
