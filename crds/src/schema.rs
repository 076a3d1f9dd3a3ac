//! Pieces of schema that derive cannot say: quantities, free-form objects, the condition list.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// True for a positive quantity, written as a number or as a string.
pub const AMOUNT_RULE: &str = "type(self) == int ? self > 0 : \
     (isQuantity(self) && quantity(self).isGreaterThan(quantity('0')))";

/// An amount of CPU, memory or storage as Kubernetes writes it (`2`, `500m`, `4Gi`). Numbers are kept as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "String")]
pub struct Amount(pub String);

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(i64),
    Text(String),
}

impl From<Written> for Amount {
    fn from(written: Written) -> Amount {
        match written {
            Written::Number(number) => Amount(number.to_string()),
            Written::Text(text) => Amount(text),
        }
    }
}

impl From<Amount> for String {
    fn from(amount: Amount) -> String {
        amount.0
    }
}

impl JsonSchema for Amount {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"x-kubernetes-int-or-string": true, "maxLength": 32})
    }
}

/// An object whose fields belong to somebody else.
pub fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// A moment, to the second.
pub fn moment(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

/// Kubernetes' condition list: a map by type, at most one entry each.
pub fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {"type": "string", "maxLength": 64,
                    "description": "What is said: Ready, Planned, ModelReady, Scheduled, EngineLoaded, Available, ScalingActive; Reconciling and Stalled only while they are true."},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"],
                    "description": "Whether it holds."},
                "reason": {"type": "string", "maxLength": 64,
                    "description": "One word for why; docs/status.md lists every one with its remedy."},
                "message": {"type": "string", "maxLength": 2048,
                    "description": "A sentence with the figures and what to do."},
                "observedGeneration": {"type": "integer", "format": "int64",
                    "description": "The generation of the object that this was said of."},
                "lastTransitionTime": {"type": "string", "format": "date-time",
                    "description": "When status last changed."}
            }
        }
    })
}
