//! The compiled kernels as they lie in this binary, one image per family of kernels.
//!
//! Enters: nothing. Leaves: bytes that a CUDA driver loads, or one sentence why there are none.

mod images {
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// A source file under `cuda/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    AttentionDecode,
    /// Hopper: one new token of each of many sequences.
    AttentionMany,
    /// Norm, RoPE and the write of keys and values for runs of tokens; their attention everywhere from sm_80.
    AttentionPrefill,
    /// Hopper: attention of runs of tokens.
    AttentionHopper,
    /// Hopper: any number of tokens up to 64, weights streamed once.
    GemmStream,
    /// Hopper: more than 64 tokens.
    GemmTile,
    /// Everywhere from sm_80.
    GemmPortable,
    Sampling,
    Stage,
    Step,
    Weights,
}

impl Family {
    pub const ALL: [Self; 11] = [
        Self::AttentionDecode,
        Self::AttentionMany,
        Self::AttentionPrefill,
        Self::AttentionHopper,
        Self::GemmStream,
        Self::GemmTile,
        Self::GemmPortable,
        Self::Sampling,
        Self::Stage,
        Self::Step,
        Self::Weights,
    ];

    /// Whether it exists for Hopper alone.
    #[must_use]
    pub fn is_hopper_only(self) -> bool {
        matches!(
            self,
            Self::AttentionMany | Self::AttentionHopper | Self::GemmStream | Self::GemmTile
        )
    }

    /// The name of its source file, without the extension.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AttentionDecode => "attention_decode",
            Self::AttentionMany => "attention_many",
            Self::AttentionPrefill => "attention_prefill",
            Self::AttentionHopper => "attention_hopper",
            Self::GemmStream => "gemm_stream",
            Self::GemmTile => "gemm_tile",
            Self::GemmPortable => "gemm_portable",
            Self::Sampling => "sampling",
            Self::Stage => "stage",
            Self::Step => "step",
            Self::Weights => "weights",
        }
    }
}

/// This binary was built without nvcc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this binary holds no CUDA kernels: {reason}; run `make cuda` to install nvcc, then build again"
)]
pub struct NoImage {
    reason: &'static str,
}

/// The fatbin of a family: SASS for sm_80, sm_89 and sm_90a, and PTX for what is newer.
///
/// # Errors
/// [`NoImage`] says what the build lacked and how to get it.
pub fn image(family: Family) -> Result<&'static [u8], NoImage> {
    let found = images::IMAGES.iter().find(|(name, _)| *name == family.name());
    found.map(|(_, image)| *image).ok_or(NoImage { reason: images::ABSENT })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_an_image_or_all_say_what_is_missing() {
        for family in Family::ALL {
            match image(family) {
                // A fatbin begins with this magic number.
                Ok(image) => assert_eq!(image[..4], 0xBA55_ED50u32.to_le_bytes()),
                Err(missing) => {
                    let sentence = missing.to_string();
                    assert!(sentence.contains("nvcc") && sentence.contains("make cuda"));
                    assert!(!missing.reason.is_empty(), "{sentence}");
                }
            }
        }
    }

    #[test]
    fn every_source_file_is_a_family_and_every_family_a_source_file() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda");
        let sources: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(sources.len(), Family::ALL.len());
        assert!(Family::ALL.iter().all(|family| sources.iter().any(|s| s == family.name())));
    }
}
