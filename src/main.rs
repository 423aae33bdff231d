//! Temporary bench driver.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "driver")]
fn main() {
    let s = sdgen::weights::synthetic::SyntheticSdxl::new();
    sdgen::pipeline::bench::measure(&s, &sdgen::nn::Placement::cpu(), sdgen::pipeline::bench::BenchOptions{width:512,height:512,steps:2}, &mut |p| println!("{:20} {:8.3}s {:7.1} GFLOP/s", p.name, p.seconds, p.operations as f64/p.seconds/1e9)).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", status.lines().find(|l| l.starts_with("VmHWM")).unwrap());
}
