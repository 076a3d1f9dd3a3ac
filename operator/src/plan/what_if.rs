//! Machines that nobody has to have: `nvidia-h200=8,nvidia-l4=4` enters, nodes leave as the operator would see them. Pure.

use super::cards::{self, Card, Gpus};
use super::machines::CPU_CLASS;
use super::{NodeResources, OpenTo, PodsSeen, figures};

/// GPUs of one node where only their number is said.
const GPUS_PER_NODE: u32 = 8;
const NODES_MAX: u32 = 1000;

/// What a host has beside its GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub memory_bytes: u64,
    pub cpu_millis: u32,
}

impl Default for Host {
    fn default() -> Host {
        Host { memory_bytes: 256 << 30, cpu_millis: 32_000 }
    }
}

/// Nodes of every part, `CLASS=GPUS` or `CLASS=NODESxGPUS` (for `cpu`: nodes), or the part that cannot be read.
pub fn nodes(parts: &[String], host: Host) -> Result<Vec<NodeResources>, String> {
    let mut nodes = Vec::new();
    for part in parts {
        let (class, amount) = part.split_once('=').ok_or_else(|| unreadable(part))?;
        let number =
            |text: &str| text.parse().ok().filter(|number| (1..=NODES_MAX).contains(number));
        let counts: Vec<u32> = match amount.split_once('x') {
            Some((nodes, gpus)) => {
                let nodes = number(nodes).ok_or_else(|| unreadable(part))?;
                let gpus = number(gpus).ok_or_else(|| unreadable(part))?;
                vec![gpus; nodes as usize]
            }
            None => {
                let amount = number(amount).ok_or_else(|| unreadable(part))?;
                if class == CPU_CLASS { vec![0; amount as usize] } else { full_nodes(amount) }
            }
        };
        let card = if class == CPU_CLASS { None } else { Some(card(class)?) };
        for count in counts {
            let name = format!("{class}-{}", nodes.len() + 1);
            nodes.push(node(name, card.clone(), count, host));
        }
    }
    Ok(nodes)
}

fn full_nodes(gpus: u32) -> Vec<u32> {
    let rest = gpus % GPUS_PER_NODE;
    let full = std::iter::repeat_n(GPUS_PER_NODE, (gpus / GPUS_PER_NODE) as usize);
    full.chain((rest > 0).then_some(rest)).collect()
}

fn node(name: String, card: Option<Card>, count: u32, host: Host) -> NodeResources {
    NodeResources {
        name,
        memory_bytes: host.memory_bytes,
        asked_bytes: 0,
        asked_cpu_millis: 0,
        pods_seen: PodsSeen::All,
        cpu_millis: host.cpu_millis,
        open_to: if card.is_some() { OpenTo::GpuPods } else { OpenTo::All },
        gpus: card.map_or(Gpus::None, Gpus::Card),
        gpu_count: count,
        asked_gpus: 0,
    }
}

/// By product label, or else by class; where one class has several forms, the first of the table.
fn card(name: &str) -> Result<Card, String> {
    let (whole, profile) = match name.to_lowercase().split_once("-mig-") {
        Some((whole, profile)) => (whole.to_owned(), Some(profile.to_owned())),
        None => (name.to_lowercase(), None),
    };
    let product = figures::all()
        .find(|figures| figures.product.to_lowercase() == whole)
        .or_else(|| figures::all().find(|figures| cards::class(figures.product) == whole))
        .map(|figures| match &profile {
            Some(profile) => format!("{}-MIG-{profile}", figures.product),
            None => figures.product.to_owned(),
        });
    let figures = product.as_deref().and_then(figures::of_product);
    let (Some(product), Some(figures)) = (product, figures) else {
        let mut known: Vec<_> = figures::all().map(|card| cards::class(card.product)).collect();
        known.dedup();
        return Err(format!(
            "no card is known as {name}; known are {CPU_CLASS}, {}",
            known.join(", ")
        ));
    };
    Ok(Card::labelled(&product, figures.memory_mebibytes))
}

fn unreadable(part: &str) -> String {
    format!(
        "{part} is no CLASS=GPUS, CLASS=NODESxGPUS or cpu=NODES, for instance nvidia-h200=8 or nvidia-l4=4x1"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<NodeResources>, String> {
        let parts: Vec<_> = text.split(',').map(str::to_owned).collect();
        nodes(&parts, Host::default())
    }

    #[test]
    fn classes_labels_and_shapes_are_read() {
        let counts = |text: &str| {
            let nodes = read(text).unwrap();
            nodes.iter().map(|node| node.gpu_count).collect::<Vec<_>>()
        };
        assert_eq!(counts("nvidia-h200=8,nvidia-l4=4"), [8, 4]);
        assert_eq!(counts("nvidia-h200=20"), [8, 8, 4]);
        assert_eq!(counts("nvidia-h200=3x4"), [4, 4, 4]);
        assert_eq!(counts("cpu=2"), [0, 0]);
        let product = |text: &str| match &read(text).unwrap()[0].gpus {
            Gpus::Card(card) => card.product.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(product("nvidia-h100=1"), "NVIDIA-H100-PCIe");
        assert_eq!(product("NVIDIA-H100-NVL=1"), "NVIDIA-H100-NVL");
        assert_eq!(product("nvidia-h200-mig-1g.18gb=7"), "NVIDIA-H200-MIG-1g.18gb");
    }

    #[test]
    fn what_cannot_be_read_is_named_with_what_could() {
        for (text, words) in [
            ("nvidia-h200", "CLASS=GPUS"),
            ("nvidia-h200=0", "nvidia-h200=0"),
            ("nvidia-h200=2x", "nvidia-h200=2x"),
            ("nvidia-x9=1", "known are cpu, nvidia-a10"),
            ("nvidia-h200-mig-odd=1", "nvidia-h200-mig-odd"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
