//! From a checkpoint to packed weights, one tensor after the other; what was converted leaves memory as a mapped file.

use plimsoll_contract::abilities::Dtype;

use super::super::LoadProgress;
use super::matrix::Matrix;
use crate::model::{Checkpoint, Linear, LoadError, Shard, TensorSpec};

#[derive(Debug)]
pub struct Loaded {
    /// `[vocabulary, hidden]`.
    pub embedding: Matrix,
    /// `[vocabulary, hidden]`; absent where it is the embedding.
    pub head: Option<Matrix>,
    pub layers: Vec<LoadedLayer>,
    /// `[hidden]`.
    pub final_norm: Vec<f32>,
}

#[derive(Debug)]
pub struct LoadedLayer {
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values in one product.
    pub qkv: Matrix,
    pub qkv_bias: Option<Vec<f32>>,
    pub query_norm: Option<Vec<f32>>,
    pub key_norm: Option<Vec<f32>>,
    pub output: Matrix,
    pub output_bias: Option<Vec<f32>>,
    pub mlp_norm: Vec<f32>,
    /// Gate and up in one product.
    pub gate_up: Matrix,
    pub gate_up_bias: Option<Vec<f32>>,
    pub down: Matrix,
    pub down_bias: Option<Vec<f32>>,
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Dtype,
    shard: Shard,
    threads: &'a rayon::ThreadPool,
}

pub fn load(
    checkpoint: &Checkpoint,
    dtype: Dtype,
    shard: Shard,
    threads: &rayon::ThreadPool,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, LoadError> {
    let loader = Loader { checkpoint, dtype, shard, threads };
    let plan = &checkpoint.plan;
    let embedding = loader.matrix(&[&plan.embedding()])?;
    let mut layers = Vec::with_capacity(plan.layers.len());
    for index in 0..plan.layers.len() {
        layers.push(loader.layer(index)?);
        progress(LoadProgress { layers_done: index + 1, layers: plan.layers.len() });
    }
    Ok(Loaded {
        embedding,
        head: plan.head().map(|head| loader.matrix(&[&head])).transpose()?,
        layers,
        final_norm: loader.vector(&plan.final_norm())?,
    })
}

impl Loader<'_> {
    fn layer(&self, index: usize) -> Result<LoadedLayer, LoadError> {
        let t = self.checkpoint.plan.layer(index);
        let norm = |spec: &Option<TensorSpec>| spec.as_ref().map(|s| self.vector(s)).transpose();
        let qkv = [&t.query, &t.key, &t.value];
        let gate_up = [&t.gate, &t.up];
        Ok(LoadedLayer {
            attention_norm: self.vector(&t.attention_norm)?,
            qkv: self.matrix(&qkv.map(|linear| &linear.weight))?,
            qkv_bias: self.bias(&qkv)?,
            query_norm: norm(&t.query_norm)?,
            key_norm: norm(&t.key_norm)?,
            output: self.matrix(&[&t.output.weight])?,
            output_bias: self.bias(&[&t.output])?,
            mlp_norm: self.vector(&t.mlp_norm)?,
            gate_up: self.matrix(&gate_up.map(|linear| &linear.weight))?,
            gate_up_bias: self.bias(&gate_up)?,
            down: self.matrix(&[&t.down.weight])?,
            down_bias: self.bias(&[&t.down])?,
        })
    }

    fn matrix(&self, specs: &[&TensorSpec]) -> Result<Matrix, LoadError> {
        let weights = &self.checkpoint.weights;
        let views = specs.iter().map(|spec| weights.tensor(spec, self.shard));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let matrix = self.threads.install(|| Matrix::pack(&views, self.dtype))?;
        specs.iter().for_each(|spec| weights.forget(spec));
        Ok(matrix)
    }

    fn vector(&self, spec: &TensorSpec) -> Result<Vec<f32>, LoadError> {
        Ok(self.checkpoint.weights.tensor(spec, self.shard)?.to_vec())
    }

    /// The biases of projections that share a product, one after the other; they come together or not at all.
    fn bias(&self, linears: &[&Linear]) -> Result<Option<Vec<f32>>, LoadError> {
        let biases = linears.iter().filter_map(|linear| linear.bias.as_ref());
        let parts = biases.map(|spec| self.vector(spec)).collect::<Result<Vec<_>, _>>()?;
        Ok((!parts.is_empty()).then(|| parts.concat()))
    }
}
