//! Safetensors files, mapped: headers are checked when they are opened, tensors are converted row by row when a backend
//! asks, and their pages are given back right after. Enters: a directory and a list of tensors that must be there.
//! Leaves: rows of `f32`. Never here: a panic or an allocation that a lying file could cause.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::error::LoadError;
use super::files;
use super::layers::{Split, TensorSpec};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The index of the largest checkpoints is a few MiB.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Files of one checkpoint; the largest known has a few hundred.
const FILES_MAX: usize = 4096;

/// Which part of every tensor this process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub of: usize,
}

impl Shard {
    /// The whole model in one process.
    pub const WHOLE: Shard = Shard { rank: 0, of: 1 };

    /// This rank's part of `size`, in whole units. Where there are fewer units than ranks, neighbours share one. None
    /// where that would not come out even.
    fn part(self, size: usize, unit: usize) -> Option<Range<usize>> {
        let units = size / unit;
        if units.is_multiple_of(self.of) {
            let each = units / self.of * unit;
            Some(self.rank * each..(self.rank + 1) * each)
        } else if self.of.is_multiple_of(units) {
            let first = self.rank / (self.of / units) * unit;
            Some(first..first + unit)
        } else {
            None
        }
    }
}

/// Types in which plain weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    Bf16,
    F16,
    F32,
}

impl Stored {
    pub fn bytes(self) -> usize {
        match self {
            Stored::Bf16 | Stored::F16 => 2,
            Stored::F32 => 4,
        }
    }
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes within the file.
    range: Range<usize>,
}

#[derive(Debug)]
pub struct Weights {
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

impl Weights {
    /// Maps the files and reads their headers.
    pub fn open(dir: &Path) -> Result<Weights, LoadError> {
        let mut weights = Weights { files: Vec::new(), entries: BTreeMap::new() };
        if dir.join(SINGLE).exists() {
            weights.add(dir.join(SINGLE))?;
            return Ok(weights);
        }
        let index = read_index(dir)?;
        let mut names: Vec<&String> = index.values().collect();
        names.sort();
        names.dedup();
        for name in names {
            weights.add(dir.join(name))?;
        }
        for (tensor, file) in &index {
            let entry = weights.entries.get(tensor);
            if entry.is_none_or(|entry| weights.files[entry.file].path != dir.join(file)) {
                return Err(corrupt(
                    &dir.join(file),
                    Some(tensor),
                    format!("the tensor that {INDEX} puts there"),
                    "a file without it",
                ));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let open = || -> std::io::Result<Mmap> {
            let file = files::open(&path)?;
            // SAFETY: the map is private and read-only. A checkpoint must not be changed while it is loaded; who
            // truncates it meanwhile ends this process, as with any mapped file.
            unsafe { Mmap::map(&file) }
        };
        let map = open().map_err(|e| corrupt(&path, None, "a readable file", e))?;
        // This also ties the file's length and every tensor's byte range to its shape and type.
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            corrupt(&path, None, "a whole safetensors file", format!("{e} ({} bytes)", map.len()))
        })?;
        let start = header + 8;
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let (first, last) = info.data_offsets;
            let entry = Entry {
                file,
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: start + first..start + last,
            };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(corrupt(&path, Some(&name), "one tensor of that name", "a second one"));
            }
        }
        self.files.push(MappedFile { path, map });
        Ok(())
    }

    /// Every tensor of `specs` is there in its shape and a plain type, and nothing else that would matter.
    pub fn check(&self, specs: &[TensorSpec]) -> Result<(), LoadError> {
        for spec in specs {
            self.whole(spec)?;
        }
        let known: std::collections::BTreeSet<&str> =
            specs.iter().map(|spec| spec.name.as_str()).collect();
        let strange = self.entries.keys().find(|name| {
            // Old checkpoints store RoPE's frequencies, and some store a tied head once more.
            !(known.contains(name.as_str())
                || name.ends_with("rotary_emb.inv_freq")
                || *name == "lm_head.weight")
        });
        match strange {
            None => Ok(()),
            Some(name) => Err(corrupt(
                &self.files[self.entries[name].file].path,
                Some(name),
                "only tensors that config.json implies",
                "one more",
            )),
        }
    }

    /// This rank's part of a tensor.
    pub fn tensor(&self, spec: &TensorSpec, shard: Shard) -> Result<TensorView<'_>, LoadError> {
        let mut view = self.whole(spec)?;
        let part = |size, unit| {
            shard.part(size, unit).ok_or_else(|| LoadError::UnsupportedModel {
                file: spec.name.clone(),
                field: "its number of parts".into(),
                found: shard.of.to_string(),
                expected: format!("it has {} units", size / unit),
                remedy: "choose a number of ranks that divides them".into(),
            })
        };
        match spec.split {
            Split::Whole => {}
            Split::Rows { unit } if spec.shape.len() == 2 => {
                view.rows = part(spec.shape[0], unit)?;
            }
            // A vector is one row: its elements belong to the rows of the matrix beside it.
            Split::Rows { unit } | Split::Columns { unit } => {
                view.columns = part(view.width, unit)?;
            }
        }
        Ok(view)
    }

    /// Gives a tensor's pages back to the system: it has been converted.
    pub fn forget(&self, spec: &TensorSpec) {
        let Some(entry) = self.entries.get(&spec.name) else { return };
        let Range { start, end } = entry.range;
        // SAFETY: the map is a private read-only view of a file, so dropped pages are read again from it when touched.
        let advised = unsafe {
            self.files[entry.file].map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                start,
                end - start,
            )
        };
        // Only advice: what the system will not drop now goes with the mapping.
        drop(advised);
    }

    /// Bytes on disk by stored type.
    pub fn disk_bytes(&self) -> BTreeMap<String, u64> {
        let mut bytes = BTreeMap::new();
        for entry in self.entries.values() {
            *bytes.entry(format!("{:?}", entry.dtype)).or_default() += entry.range.len() as u64;
        }
        bytes
    }

    fn whole(&self, spec: &TensorSpec) -> Result<TensorView<'_>, LoadError> {
        let Some(entry) = self.entries.get(&spec.name) else {
            let file = self.files.first().map(|file| file.path.as_path());
            let file = file.unwrap_or(Path::new(SINGLE));
            let expected = format!("shape {:?}", spec.shape);
            return Err(corrupt(file, Some(&spec.name), expected, "no such tensor"));
        };
        let file = &self.files[entry.file];
        if entry.shape != spec.shape {
            return Err(corrupt(
                &file.path,
                Some(&spec.name),
                format!("shape {:?}", spec.shape),
                format!("shape {:?}", entry.shape),
            ));
        }
        let stored = match entry.dtype {
            Dtype::BF16 => Stored::Bf16,
            Dtype::F16 => Stored::F16,
            Dtype::F32 => Stored::F32,
            other => {
                return Err(LoadError::UnsupportedModel {
                    file: file.path.display().to_string(),
                    field: format!("the type of {}", spec.name),
                    found: format!("{other:?}"),
                    expected: "the engine reads BF16, F16 and F32".into(),
                    remedy: "choose the unquantized checkpoint".into(),
                });
            }
        };
        let width = spec.shape[spec.shape.len() - 1];
        let rows = spec.shape[..spec.shape.len() - 1].iter().product();
        // The header's own check ties a tensor's byte range to its shape and type, so this slice has whole rows.
        let bytes = &file.map[entry.range.clone()];
        Ok(TensorView { bytes, stored, width, rows: 0..rows, columns: 0..width })
    }
}

/// A tensor's rows and columns that belong to this rank; a vector is one row.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    bytes: &'a [u8],
    stored: Stored,
    /// Columns of the whole tensor.
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl TensorView<'_> {
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    pub fn columns(&self) -> usize {
        self.columns.len()
    }

    /// Converts one row. `out` `[columns]`.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows.len(), "the row belongs to the view");
        assert_eq!(out.len(), self.columns.len(), "the output holds one row");
        let first = (self.rows.start + row) * self.width + self.columns.start;
        let size = self.stored.bytes();
        let bytes = &self.bytes[first * size..(first + self.columns.len()) * size];
        match self.stored {
            Stored::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            Stored::F16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f16::from_le_bytes(*bytes).to_f32();
                }
            }
            Stored::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
        }
    }

    /// The bytes as they are stored, little-endian, and their type. Whole rows only: None where columns were cut.
    pub fn stored(&self) -> Option<(&[u8], Stored)> {
        if self.columns != (0..self.width) {
            return None;
        }
        let row = self.width * self.stored.bytes();
        Some((&self.bytes[self.rows.start * row..self.rows.end * row], self.stored))
    }

    /// All rows one after the other. `[rows, columns]`.
    pub fn to_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows.len() * self.columns.len()];
        for (row, out) in out.chunks_exact_mut(self.columns.len().max(1)).enumerate() {
            self.read_row(row, out);
        }
        out
    }
}

/// `weight_map` of the index: which file holds which tensor.
fn read_index(dir: &Path) -> Result<BTreeMap<String, String>, LoadError> {
    let path = dir.join(INDEX);
    if !path.exists() {
        return Err(LoadError::ModelNotFound {
            source_name: dir.display().to_string(),
            problem: format!("neither {SINGLE} nor {INDEX} is there"),
            remedy: "give a directory with config.json and *.safetensors".into(),
        });
    }
    let text = files::read(&path, INDEX_BYTES_MAX)
        .map_err(|e| corrupt(&path, None, "a readable file of at most 64 MiB", e))?;
    let json: Value =
        serde_json::from_slice(&text).map_err(|e| corrupt(&path, None, "valid JSON", e))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| corrupt(&path, None, "an object weight_map", "none"))?;
    let mut index = BTreeMap::new();
    for (tensor, file) in map {
        // A name, not a path: an index must not lead out of its directory.
        let name = file.as_str().filter(|name| {
            name.ends_with(".safetensors") && !name.contains('/') && !name.contains('\\')
        });
        let name = name.ok_or_else(|| {
            corrupt(&path, Some(tensor), "the name of a .safetensors file beside it", file)
        })?;
        index.insert(tensor.clone(), name.to_owned());
    }
    let files: std::collections::BTreeSet<&String> = index.values().collect();
    if files.len() > FILES_MAX {
        let found = format!("{} files", files.len());
        return Err(corrupt(&path, None, format!("at most {FILES_MAX} files"), found));
    }
    Ok(index)
}

fn corrupt(
    file: &Path,
    tensor: Option<&str>,
    expected: impl Into<String>,
    found: impl ToString,
) -> LoadError {
    LoadError::CorruptWeights {
        file: file.to_owned(),
        tensor: tensor.map(|name| name.chars().take(200).collect()),
        expected: expected.into(),
        found: found.to_string().chars().take(300).collect(),
    }
}
