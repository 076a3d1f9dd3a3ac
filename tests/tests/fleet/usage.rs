//! In: process numbers. Out: the processor time and memory they took, and how loaded the machine was, from /proc.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How often the machine's load is read; the kernel computes it anew every five seconds.
const LOAD_EVERY: Duration = Duration::from_secs(5);

/// What a stretch of time cost.
pub struct Meter {
    began: Instant,
    /// By name: process number, and processor seconds before.
    processes: Vec<(&'static str, u32, f64)>,
    over: Arc<AtomicBool>,
    loads: JoinHandle<Vec<f64>>,
}

impl Meter {
    pub fn start(processes: &[(&'static str, u32)]) -> Meter {
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let loads = std::thread::spawn(move || {
            let mut loads = vec![load()];
            let mut last = Instant::now();
            while !ends.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                if last.elapsed() >= LOAD_EVERY {
                    loads.push(load());
                    last = Instant::now();
                }
            }
            loads
        });
        let processes = processes.iter().map(|(name, id)| (*name, *id, processor_seconds(*id)));
        Meter { began: Instant::now(), processes: processes.collect(), over, loads }
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Seconds of a processor so far, by process.
    pub fn processor_seconds(&self) -> Value {
        let mut busy = json!({});
        for (name, id, before) in &self.processes {
            busy[*name] = rounded(processor_seconds(*id) - before).into();
        }
        busy
    }

    /// The same, and least, mean and greatest load of the last minute.
    pub fn stop(self) -> Value {
        let seconds = self.began.elapsed().as_secs_f64();
        let busy = self.processor_seconds();
        self.over.store(true, Ordering::Relaxed);
        let loads = self.loads.join().unwrap();
        let mean = loads.iter().sum::<f64>() / loads.len() as f64;
        let least = loads.iter().copied().fold(f64::INFINITY, f64::min);
        let most = loads.iter().copied().fold(0.0, f64::max);
        json!({"seconds": rounded(seconds), "processorSeconds": busy,
            "load": {"min": least, "mean": rounded(mean), "max": most}})
    }
}

pub fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// User and system time of all threads.
fn processor_seconds(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The name stands in parentheses and may hold anything; 14th and 15th field are ticks of 10 ms.
    let after = text.rsplit_once(") ").unwrap().1;
    let ticks: u64 =
        after.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    ticks as f64 / 100.0
}

/// Resident memory now and at most, in MB.
pub fn resident(process: u32) -> (f64, f64) {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        rounded(kib * 1024.0 / 1e6)
    };
    (field("VmRSS:"), field("VmHWM:"))
}
