//! What an hour of a GPU costs, by class. The table is dated and small, and whoever pays other prices gives them: a file of
//! `class: dollars` leaves as the same type. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

/// When the prices below were looked up.
pub const DATE: &str = "2026-05";

/// Class, US dollars for an hour of one GPU, whose list it is from. Lists of other providers differ by a factor of two.
const PRICES: &[(&str, f64, &str)] = &[
    ("nvidia-a10", 0.86, "Lambda, on demand"),
    ("nvidia-a100-40gb", 1.48, "Lambda, on demand"),
    ("nvidia-a100-80gb", 2.16, "RunPod, active workers"),
    ("nvidia-a40", 0.864, "RunPod, active workers"),
    ("nvidia-b200", 6.84, "RunPod, active workers"),
    ("nvidia-geforce-rtx-4090", 0.756, "RunPod, active workers"),
    ("nvidia-geforce-rtx-5090", 1.22, "RunPod, on demand"),
    ("nvidia-h100-80gb", 3.348, "RunPod, active workers"),
    ("nvidia-h200", 4.464, "RunPod, active workers"),
    ("nvidia-l4", 0.468, "RunPod, active workers"),
    ("nvidia-l40", 1.332, "RunPod, active workers"),
    ("nvidia-l40s", 1.332, "RunPod, active workers"),
    ("nvidia-rtx-6000-ada-generation", 1.332, "RunPod, active workers"),
    ("nvidia-rtx-a6000", 0.864, "RunPod, active workers"),
];

/// More an hour than any GPU costs is a slip of the pen.
const DOLLARS_MAX: f64 = 10_000.0;

/// Millionths of a US dollar for an hour of one GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prices(BTreeMap<String, u64>);

impl Default for Prices {
    fn default() -> Prices {
        let row = |(class, dollars, _): &(&str, f64, &str)| ((*class).to_owned(), micro(*dollars));
        Prices(PRICES.iter().map(row).collect())
    }
}

fn micro(dollars: f64) -> u64 {
    (dollars * 1e6).round() as u64
}

impl Prices {
    pub fn of(&self, class: &str) -> Option<u64> {
        self.0.get(class).copied()
    }

    /// The table with some classes at other prices: an object of `class: dollars for an hour`.
    pub fn overridden(given: &Value) -> Result<Prices, String> {
        let Some(given) = given.as_object() else {
            return Err("must be a map of class: US dollars for an hour of one GPU, for instance nvidia-h200: 3.5".to_owned());
        };
        let mut prices = Prices::default();
        for (class, price) in given {
            prices.set(class, price.as_f64(), &price.to_string())?;
        }
        Ok(prices)
    }

    /// The table with some classes at other prices, each as `class=dollars`.
    pub fn listed(given: &[String]) -> Result<Prices, String> {
        let mut prices = Prices::default();
        for part in given {
            let (class, price) = part.split_once('=').unwrap_or((part, ""));
            prices.set(class, price.parse().ok(), price)?;
        }
        Ok(prices)
    }

    fn set(&mut self, class: &str, dollars: Option<f64>, given: &str) -> Result<(), String> {
        let Some(dollars) = dollars.filter(|dollars| (0.0..=DOLLARS_MAX).contains(dollars)) else {
            return Err(format!(
                "{class}: must be US dollars for an hour of one GPU, from 0 to 10,000, and is {given:?}"
            ));
        };
        self.0.insert(class.to_owned(), micro(dollars));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{cards, figures};
    use super::*;

    #[test]
    fn given_prices_come_before_the_table_and_wrong_ones_are_named() {
        let prices = Prices::overridden(&json!({"nvidia-h200": 3.5, "ours": 0})).unwrap();
        assert_eq!(prices.of("nvidia-h200"), Some(3_500_000));
        assert_eq!(prices.of("ours"), Some(0));
        assert_eq!(prices.of("nvidia-l4"), Prices::default().of("nvidia-l4"));
        for wrong in [json!({"nvidia-h200": "cheap"}), json!({"nvidia-h200": -1}), json!([1])] {
            assert!(Prices::overridden(&wrong).is_err(), "{wrong}");
        }
        let listed = |price: &str| Prices::listed(&[price.to_owned()]);
        assert_eq!(listed("nvidia-h200=3.5").unwrap().of("nvidia-h200"), Some(3_500_000));
        for wrong in ["nvidia-h200", "nvidia-h200=NaN", "nvidia-h200=x"] {
            assert!(listed(wrong).unwrap_err().contains("US dollars"), "{wrong}");
        }
    }

    #[test]
    fn prices_are_of_cards_that_are_known_and_each_has_a_source() {
        for (class, dollars, source) in PRICES {
            assert!(figures::all().any(|card| cards::class(card.product) == *class), "{class}");
            assert!(*dollars > 0.0 && !source.is_empty());
            let docs = include_str!("../../../docs/planner.md");
            let row = docs
                .lines()
                .find(|line| line.contains(class) && line.contains(&dollars.to_string()));
            assert!(row.is_some(), "{class} {dollars}");
        }
        assert_eq!(DATE.len(), "2026-05".len());
    }
}
