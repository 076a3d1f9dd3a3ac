//! In: figures. Out: whether each target of Plimsoll is met, and a page for docs/soak.

use serde_json::Value;

/// Objects that name one with one replica as their owner: account, Service, NetworkPolicy, revision, Deployment, and the facts
/// that it shares with others of its model.
const CHILDREN: f64 = 6.0;

pub struct Target {
    pub name: &'static str,
    /// NaN where it was not measured, which keeps to nothing.
    pub measured: f64,
    pub wanted: f64,
    /// What a short run has to keep to, on a machine with other work. Nothing is asked of times there.
    pub wanted_anywhere: Option<f64>,
}

impl Target {
    pub fn keeps_to(&self, bound: f64) -> bool {
        self.measured <= bound
    }
}

/// What issue and README promise.
pub fn targets(figures: &Value) -> Vec<Target> {
    let target = |name, pointer: &str, wanted, wanted_anywhere| {
        let measured = figures.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Target { name, measured, wanted, wanted_anywhere }
    };
    let time = |name, pointer, wanted| target(name, pointer, wanted, None);
    let amount = |name, pointer, wanted| target(name, pointer, wanted, Some(wanted));
    vec![
        time("all children of a burst, s", "/creation/allChildrenAfter", 25.0),
        time("object to last child in a trickle, p99, s", "/trickle/objectToLastChild/p99", 0.3),
        // Slow controllers show an object in three between its pod and its being Ready: a status more.
        target(
            "writes per object until quiet",
            "/creation/requests/writesPerObject",
            CHILDREN + 4.0,
            Some(CHILDREN + 4.35),
        ),
        time("Ready after its pod, p99, s", "/creation/podReadyToReady/p99", 1.0),
        amount("writes at rest", "/rest/requests/writes", 0.0),
        amount("reads at rest beside watches", "/rest/requests/reads", 0.0),
        time("operator at rest, % of a core", "/rest/operatorPercentOfACore", 0.2),
        amount("writes at a restart", "/restart/requests/writes", 0.0),
        time("every object looked at after a restart, s", "/restart/everyObjectLookedAtAfter", 5.0),
        amount("resident memory at most, MB", "/residentMB/max", 60.0),
        amount("the same after a restart", "/residentMB/maxAfterRestart", 60.0),
    ]
}

type Row = (&'static str, fn(&Value) -> String);

const ROWS: &[Row] = &[
    ("created in", |run| seconds(run, "/creation/createdIn")),
    ("object → last child, p50 / p90 / p99 / max", |run| {
        spread(run, "/creation/objectToLastChild")
    }),
    ("all children after", |run| seconds(run, "/creation/allChildrenAfter")),
    ("all pods Ready after (the controller-manager's pace)", |run| {
        seconds(run, "/creation/allPodsReadyAfter")
    }),
    ("pod Ready → object Ready, p50 / p90 / p99 / max", |run| {
        spread(run, "/creation/podReadyToReady")
    }),
    ("all objects Ready after", |run| seconds(run, "/creation/allReadyAfter")),
    ("operator quiet after", |run| seconds(run, "/creation/quietAfter")),
    ("writes per object until quiet", |run| number(run, "/creation/requests/writesPerObject")),
    ("reads per object until quiet", |run| number(run, "/creation/requests/readsPerObject")),
    ("conflicts", |run| number(run, "/creation/requests/conflicts")),
    ("processor until quiet: operator, API server", |run| processor(run, "/creation")),
    ("**rest**, 5 min: writes", |run| number(run, "/rest/requests/writes")),
    ("reads beside watch renewals", |run| number(run, "/rest/requests/reads")),
    ("watch renewals; requests for the Lease", |run| {
        format!(
            "{}; {}",
            number(run, "/rest/requests/watches"),
            number(run, "/rest/requests/leases")
        )
    }),
    ("operator, % of a core", |run| number(run, "/rest/operatorPercentOfACore")),
    ("**restart**: writes", |run| number(run, "/restart/requests/writes")),
    ("every object looked at after", |run| seconds(run, "/restart/everyObjectLookedAtAfter")),
    ("**10 a second**: object → last child, p50 / p90 / p99 / max", |run| {
        spread(run, "/trickle/objectToLastChild")
    }),
    ("resident memory: empty / at rest / at most", |run| {
        let of = |name: &str| number(run, &format!("/residentMB/{name}"));
        format!("{} / {} / {} MB", of("empty"), of("steady"), of("max"))
    }),
    ("load of the machine, mean: creation / rest / restart / trickle", |run| {
        let of = |part: &str| number(run, &format!("/{part}/load/mean"));
        format!("{} / {} / {} / {}", of("creation"), of("rest"), of("restart"), of("trickle"))
    }),
];

fn number(run: &Value, pointer: &str) -> String {
    run.pointer(pointer).filter(|found| !found.is_null()).map_or("–".to_owned(), Value::to_string)
}

fn seconds(run: &Value, pointer: &str) -> String {
    format!("{} s", number(run, pointer))
}

fn spread(run: &Value, pointer: &str) -> String {
    let places =
        ["p50", "p90", "p99", "max"].map(|place| number(run, &format!("{pointer}/{place}")));
    format!("{} s", places.join(" / "))
}

fn processor(run: &Value, pointer: &str) -> String {
    let of = |name: &str| number(run, &format!("{pointer}/processorSeconds/{name}"));
    format!("{}, {} s", of("operator"), of("apiServer"))
}

/// A table of all that ran, and of the targets.
pub fn markdown(figures: &Value) -> String {
    let set_up = &figures["setUp"];
    let text = |name: &str| match &set_up[name] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let runs: Vec<(&str, &Value)> =
        [("Plimsoll", "plimsoll"), ("LeaderWorkerSet 0.9.0", "leaderWorkerSet")]
            .into_iter()
            .filter_map(|(title, name)| Some((title, figures.get(name)?)))
            .collect();
    let mut page = format!(
        "<!-- Written by `make soak-fleet`. -->\n\n# {} objects\n\n`make soak-fleet`: {} objects made by {} clients in {} \
         namespaces, on {} fake nodes with 32 GPUs (kwok {}, pods Ready at once); Kubernetes {}, etcd {}, on one machine \
         with {} cores ({}) that operator, control plane and watcher share. Controller-manager: {}. What a model needs is \
         known beforehand; no engine runs. All figures: [fleet.json](fleet.json).\n\n|",
        text("objects"),
        text("objects"),
        text("clients"),
        text("namespaces"),
        text("nodes"),
        text("kwok"),
        text("kubernetes"),
        text("etcd"),
        text("cores"),
        text("processor"),
        text("controllerManager"),
    );
    let titles: String = runs.iter().map(|(title, _)| format!(" {title} |")).collect();
    page.push_str(&format!(" |{titles}\n|---|{}\n", "---|".repeat(runs.len())));
    for (name, cell) in ROWS {
        let cells: String = runs.iter().map(|(_, run)| format!(" {} |", cell(run))).collect();
        page.push_str(&format!("| {name} |{cells}\n"));
    }
    page.push_str("\n| target | wanted | measured | |\n|---|---|---|---|\n");
    for target in targets(&figures["plimsoll"]) {
        let verdict = if target.keeps_to(target.wanted) { "met" } else { "**missed**" };
        let Target { name, measured, wanted, .. } = target;
        page.push_str(&format!("| {name} | ≤ {wanted} | {measured} | {verdict} |\n"));
    }
    page
}
