-- Health of an LLMDeployment for Argo CD, in the layout of its resource_customizations. docs/gitops.md says how to use it.
local health = {status = "Progressing", message = "No operator has looked at it yet"}

if obj.metadata.deletionTimestamp ~= nil then
  health.message = "It is being deleted"
  return health
end
if obj.status == nil or obj.status.conditions == nil then
  return health
end

local held = {}
for _, condition in ipairs(obj.status.conditions) do
  held[condition.type] = condition
end
local ready = held["Ready"]
if ready ~= nil then
  health.message = ready.reason .. ": " .. (ready.message or "")
end
if obj.status.observedGeneration ~= obj.metadata.generation then
  health.message = "Its last change has not been seen yet"
  return health
end
if held["Stalled"] ~= nil and held["Stalled"].status == "True" then
  health.status = "Degraded"
elseif ready ~= nil and ready.status == "True" then
  health.status = "Healthy"
elseif ready ~= nil and ready.reason == "Suspended" then
  health.status = "Suspended"
elseif ready ~= nil and ready.reason == "ScaledToZero" then
  health.status = "Healthy"
end
return health
